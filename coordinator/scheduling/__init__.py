"""Texts that are computed side by side: which pages of the KV cache hold them, and whose turn it is."""
