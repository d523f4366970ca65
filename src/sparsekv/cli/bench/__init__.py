"""`sparsekv bench`: speed, a file for each kind of work."""
