"""Benchmarks: medians, each beside a measured roofline or a rival run in the same process. Never timed tests."""
