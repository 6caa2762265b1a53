"""What a prompt's tokens used.  pytest tests/coordinator/balancing/test_prompts.py"""

import numpy as np

from warmfront.coordinator.balancing.prompts import load_by_choices, load_by_firing


def test_groups_are_read_as_often_as_their_branch_is_used() -> None:
    uses, bounds = np.array([[10, 4, 0], [10, 0, 5]]), np.array([0, 1, 3, 4])
    use_bytes = np.array([[100.0, 10, 20, 30], [100, 40, 50, 60]])
    load = load_by_choices(10, uses, bounds, use_bytes)
    assert load.tokens == 10
    np.testing.assert_allclose(load.bytes_read, [[100, 4, 8, 0], [100, 0, 0, 30]])


def test_neurons_are_counted_for_the_tokens_that_there_are() -> None:
    rng, tokens = np.random.default_rng(0), 37
    fired = rng.random((2, 3, 32, 48)) < 0.3  # the last eleven are of no token
    noted = np.packbits(fired, axis=-1, bitorder="little").view(np.uint16)
    load = load_by_firing(tokens, noted, lambda firing: 2 * firing)
    np.testing.assert_allclose(load.bytes_read, 2 * fired[..., :tokens].sum((2, 3)) / tokens)
    whole = load_by_firing(48, noted, lambda firing: firing)
    np.testing.assert_allclose(whole.bytes_read, fired.sum((2, 3)) / 48)
