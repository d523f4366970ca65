"""Every method measured alike: through the real cache, as generation reads, with what was held and read beside each
score."""
