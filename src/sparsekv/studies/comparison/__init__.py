"""Every method in the same cache and engine, at equal ratios: what it costs, holds and reads, and how fast it is."""
