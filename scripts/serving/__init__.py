"""A server of a script's own, and requests whose tokens are timed."""
