"""`sparsekv inspect`: what is asked, its figures and its page."""
