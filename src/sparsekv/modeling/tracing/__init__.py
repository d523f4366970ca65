"""Which token lies where, and which head forgot it."""
