"""Cpus, cores, memory nodes, processes and the driver of this machine. Knows nothing of models."""
