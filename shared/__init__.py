"""What every warmfront process must agree on: errors, configuration, byte layouts, messages, kernels.

Imports no sibling package, no torch and no cupy, so that a worker starts quickly and alone.
"""
