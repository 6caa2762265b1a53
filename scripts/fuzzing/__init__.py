"""The parts of `fuzz_models.py`: whole files, their damage, and the child that tries them."""
