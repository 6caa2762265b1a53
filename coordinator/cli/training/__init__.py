"""`warmfront train-predictor`: its declaration, and what it does."""
