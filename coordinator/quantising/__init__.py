"""Rounding weights to few bits so that a model says what it said."""
