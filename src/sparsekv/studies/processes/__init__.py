"""Retrofits by several processes beside those of one, within the noise of their arithmetic; see __main__.py."""
