"""GGUF files, and PowerInfer's dialect of them."""
