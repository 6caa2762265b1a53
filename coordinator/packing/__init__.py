"""The packed file and the cache it lies in: written, found, removed. The formats of others are read in `models`."""
