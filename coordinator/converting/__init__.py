"""Writing a model as a GGUF file."""
