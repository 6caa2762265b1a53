"""The model behind `simulate_balancing.py`: traces of what fires, devices, and the replay of one on the other."""
