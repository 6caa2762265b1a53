"""The KV cache of the compiled pass: its memory, and how keys and values get there."""
