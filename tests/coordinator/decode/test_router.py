"""Which experts are chosen, against torch.  pytest tests/coordinator/decode/test_router.py"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.shared.model.specs import SPEC, changed
from warmfront.coordinator.decode.network import Router
from warmfront.coordinator.decode.router import choose_experts, router_of, write_mask
from warmfront.shared.model.architecture import Experts

RNG = np.random.default_rng(4)


def router(**options: object) -> Router:
    experts = replace(Experts(number=21, active=4), **options)
    return router_of(changed(SPEC, "architecture.feed_forward.experts", experts))


NONE = np.zeros(0, np.float32)


def weights(router: Router, scores: np.ndarray, correction: np.ndarray = NONE) -> np.ndarray:
    out = np.full(len(router.bounds) - 1, 7, np.float32)
    choose_experts(router, np.append(scores, RNG.normal(size=16)).astype(np.float32), correction, out)
    return out


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [False, True])
def test_weights_are_those_of_torch(scoring: str, normalised: bool) -> None:
    made = router(scoring=scoring, normalised=normalised, scale=2.5)
    for scores in RNG.normal(size=(20, 21)) * 4:
        values = torch.from_numpy(scores.astype(np.float32))
        chances = values.softmax(0) if scoring == "softmax" else values.sigmoid()
        best = chances.topk(4)
        expected = np.zeros(22, np.float32)
        expected[0] = 1
        expected[1 + best.indices.numpy()] = 2.5 * best.values / (best.values.sum() if normalised else 1)
        np.testing.assert_allclose(weights(made, scores), expected, rtol=2e-6)


@pytest.mark.parametrize(("groups", "active_groups"), [(1, 1), (7, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_corrected_choices_from_groups_are_those_of_torch(scoring: str, groups: int, active_groups: int) -> None:
    made = router(scoring=scoring, normalised=True, corrected=True, groups=groups, active_groups=active_groups)
    for scores, correction in RNG.normal(size=(50, 2, 21)).astype(np.float32):
        values = torch.from_numpy(scores).softmax(0) if scoring == "softmax" else torch.from_numpy(scores).sigmoid()
        keys = (values + torch.from_numpy(correction)).view(groups, -1)
        left = keys.topk(2).values.sum(1).topk(active_groups).indices
        limited = torch.full_like(keys, -torch.inf)
        limited[left] = keys[left]
        best = limited.flatten().topk(4).indices
        expected = np.zeros(22, np.float32)
        expected[0] = 1
        expected[1 + best.numpy()] = values[best] / values[best].sum()
        np.testing.assert_allclose(weights(made, scores, correction), expected, rtol=2e-6)


def test_of_equal_scores_the_first_are_chosen() -> None:
    scores = np.zeros(21)
    scores[[3, 9]] = 1
    assert np.flatnonzero(weights(router(), scores)).tolist() == [0, 1, 2, 4, 10]


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf, 1e30])
def test_as_many_as_are_active_whatever_the_scores(score: float) -> None:
    got = weights(router(normalised=True), np.full(21, score))
    assert np.count_nonzero(got) == 5
    assert (got[5:] == 0).all()


@pytest.mark.parametrize("score", [-30.0, -50.0, -100.0, -1e4])
def test_low_sigmoids_are_scaled_as_in_transformers(score: float) -> None:
    """Those of a GLM-4.5 add up to more than 0, in whatever precision."""
    values = torch.full((4,), score, dtype=torch.float64).sigmoid()
    expected = values / (values.sum() + 1e-20)
    got = weights(router(scoring="sigmoid", normalised=True), np.full(21, score))
    np.testing.assert_allclose(got[1:5], expected, rtol=1e-6)
    assert not got[5:].any()


def test_the_gate_of_the_shared_expert_is_a_sigmoid_of_the_last_score() -> None:
    made = router(shared=40, shared_gate=True)
    got, scores = np.zeros(23, np.float32), RNG.normal(size=32).astype(np.float32)
    choose_experts(made, scores, NONE, got)
    assert got[22] == pytest.approx(1 / (1 + np.exp(-scores[21])), rel=1e-6)


def test_the_mask_has_the_groups_of_what_is_used() -> None:
    made = router(number=3, active=1, shared=40)  # groups: 2 of the shared expert, 3 of each other
    words = np.full(11, 5, np.uint32)
    uses = np.full(4, 7, np.uint8)
    write_mask(made, np.array([1, 0, 0.5, 0], np.float32), words, uses)
    assert uses.tolist() == [1, 0, 1, 0]
    assert np.flatnonzero(words).tolist() == [0, 1, 5, 6, 7]
    assert (words[[0, 1, 5, 6, 7]] == 0xFFFFFFFF).all()
