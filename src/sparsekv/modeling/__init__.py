"""Where sparsekv meets Transformers: attach, the attention function, the cache face, adapters, the embedded model."""
