"""Whether a GPU is used: what speaks against it, and the check that torch computes rightly on it."""
