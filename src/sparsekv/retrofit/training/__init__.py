"""The training run: its loss, its steps, and what is kept of them."""
