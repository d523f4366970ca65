"""Logits that the queries carry: no eviction heads, a channel of the model itself."""
