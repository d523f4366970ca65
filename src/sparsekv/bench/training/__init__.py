"""Training, by one process and by several."""
