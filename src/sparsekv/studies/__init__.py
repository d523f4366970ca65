"""Grids of runs, each measured alike, and the pages that show them."""
