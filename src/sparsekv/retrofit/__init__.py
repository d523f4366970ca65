"""Retrofit: teach a model's eviction heads what can be forgotten, then dial them to any ratio."""
