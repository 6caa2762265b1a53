"""The endpoints that take text and give text: what they read, queue and write."""
