"""Which experts are chosen.  pytest tests/coordinator/profile/test_expert_uses.py"""

import numpy as np
import pytest

from warmfront.coordinator.profile.expert_uses import ExpertUses, count_experts


def test_pieces_of_texts_are_counted_and_what_was_chosen_before_is_not() -> None:
    uses, pieces, done = np.full((2, 4), 7), [], []

    def read(ids: list[int]) -> None:
        pieces.append(list(ids))
        for token in ids:
            uses[:, token] += 1

    texts = [("a", [0, 1, 0]), ("empty", []), ("b", [2])]
    counted = count_experts(read, lambda: uses, texts, 2, done.append)
    assert pieces == [[0, 1], [0], [2]]
    assert done == [2, 3, 4]
    assert counted.uses.tolist() == [[2, 1, 1, 0]] * 2
    assert (counted.tokens, counted.texts) == (4, ["a", "b"])


def test_shares_and_chances() -> None:
    # Ten of twenty experts' choices fall on two of them; the last layer has none.
    uses = np.array([[25, 25, *[5] * 10, *[0] * 8], [5] * 20, [0] * 20])
    counted = ExpertUses(uses, 50, ["a"])
    np.testing.assert_allclose(counted.shares().sum(1), [1, 1, 0])
    np.testing.assert_allclose(counted.busiest(), [0.5, 0.1])
    chances = counted.chances(2)
    np.testing.assert_allclose(chances[:2].sum(1), 2)
    assert chances[0, 0] == pytest.approx((25 + 0.1) / 51)
    assert 0 < chances[0, -1] < 0.01
