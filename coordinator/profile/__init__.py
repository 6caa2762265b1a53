"""Which neurons fire: counted, kept, and turned into an order of neurons. Not used while a model runs."""
