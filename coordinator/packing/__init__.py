"""Packed files and the cache they are in: writing, finding, removing. Published formats are read in `models`."""
