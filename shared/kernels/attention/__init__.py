"""Arithmetic on the tiles of the KV cache. Knows no layer and no thread."""
