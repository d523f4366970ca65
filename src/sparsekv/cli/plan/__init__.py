"""`sparsekv plan`: what is asked, and its report."""
