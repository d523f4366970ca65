"""What is fetched once and kept: the embedded model, texts, and how (wheels, Debian packages, checksums)."""
