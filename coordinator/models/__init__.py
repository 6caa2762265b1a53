"""Readers: models as their makers publish them, tensor by tensor. Nothing here writes a file or starts a process."""
