"""Decides what runs next, on the host alone: nothing here imports torch."""
