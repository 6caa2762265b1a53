"""The parts of `make_synthetic_model.py`: sizes, weights, and the files they are written to."""
