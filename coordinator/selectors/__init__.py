"""What selectors keep in files of their own, and their calibration; their arithmetic is in `decode`."""
