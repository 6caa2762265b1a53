"""Low-rank predictors of which neurons fire, made from a model's own inputs on text. Not used while a model runs."""
