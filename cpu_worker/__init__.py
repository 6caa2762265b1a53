"""The CPU worker: one process per NUMA node, one resident pinned thread per core, feed-forward neurons in RAM."""
