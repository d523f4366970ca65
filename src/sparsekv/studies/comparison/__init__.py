"""Every method in the same cache and engine, at equal ratios: what it costs, what it holds and reads, how fast it is."""
