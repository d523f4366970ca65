"""`sparsekv demo`: what is run, on which task, and its table."""
