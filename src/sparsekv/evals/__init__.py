"""What eviction costs: perplexity, divergence from dense, and retrieval, with the measured ratio beside each."""
