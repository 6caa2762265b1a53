"""Measurements that run whole engines: bench, tune, the time that a group of neurons costs."""
