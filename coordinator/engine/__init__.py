"""The Python API, what it decides and what it starts: plan, processes, statistics. No arithmetic, no printing."""
