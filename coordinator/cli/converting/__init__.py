"""`warmfront convert`."""
