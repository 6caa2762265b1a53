"""A neuron group's arithmetic: gates, ups, down rows, exact sums. Knows no board and no owner."""
