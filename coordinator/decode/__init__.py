"""One pass of tokens through all layers: attention, norms, predictors, posting feed-forward jobs. No policy."""
