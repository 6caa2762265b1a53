"""The list of a model's tensors.  pytest tests/shared/model/test_tensors.py"""

from typing import Any

import pytest

from tests.shared.model.specs import SPEC, changed
from warmfront.shared.model.tensors import file_shapes, predictor_shapes

LAYER = {
    "attn_norm": (32,),
    "q": (32, 32),
    "k": (16, 32),
    "v": (16, 32),
    "o": (32, 32),
    "ffn_norm": (32,),
    "gate": (70, 32),
    "up": (70, 32),
    "down": (32, 70),
}


POST_NORMS = {"layers.{i}.attn_post_norm": (32,), "layers.{i}.ffn_post_norm": (32,)}


def test_all_of_a_llama() -> None:
    """In the order in which they are looked for."""
    layers = [(f"layers.{i}.{part}", shape) for i in range(2) for part, shape in LAYER.items()]
    assert list(file_shapes(SPEC)) == [("embed", (5, 32)), ("head", (5, 32)), ("norm", (32,)), *layers]


@pytest.mark.parametrize(
    ("path", "value", "more", "fewer"),
    [
        ("tied_head", True, {}, {"head"}),
        ("attention.biases", ("q", "v"), {"layers.{i}.q.bias": (32,), "layers.{i}.v.bias": (16,)}, set()),
        ("attention.qk_norm", "head", {"layers.{i}.q_norm": (16,), "layers.{i}.k_norm": (16,)}, set()),
        ("attention.qk_norm", "whole", {"layers.{i}.q_norm": (32,), "layers.{i}.k_norm": (16,)}, set()),
        ("norm.placement", "sandwich", POST_NORMS, set()),
        ("norm.placement", "post", POST_NORMS, {"layers.{i}.attn_norm", "layers.{i}.ffn_norm"}),
        ("feed_forward.biases", ("up", "down"), {"layers.{i}.up.bias": (70,), "layers.{i}.down.bias": (32,)}, set()),
        ("feed_forward.gated", False, {}, {"layers.{i}.gate"}),
        ("norm.placement", "sum", POST_NORMS, {"layers.{i}.attn_norm", "layers.{i}.ffn_norm"}),
        ("norm.final", False, {}, {"norm"}),
        ("positions.learned_offset", 2, {"positions": (66, 32)}, set()),
        (
            "norm.bias",
            True,
            {"norm.bias": (32,), "layers.{i}.attn_norm.bias": (32,), "layers.{i}.ffn_norm.bias": (32,)},
            set(),
        ),
    ],
)
def test_each_feature_has_its_tensors(path: str, value: Any, more: dict[str, Any], fewer: set[str]) -> None:
    plain, found = dict(file_shapes(SPEC)), dict(file_shapes(changed(SPEC, f"architecture.{path}", value)))
    wanted = {name.format(i=i): shape for i in range(2) for name, shape in more.items()}
    assert {name: found[name] for name in found.keys() - plain.keys()} == wanted
    assert plain.keys() - found.keys() == {name.format(i=i) for i in range(2) for name in fewer}


def test_a_norm_of_attention_and_feed_forward_is_there_once() -> None:
    parallel = changed(SPEC, "architecture.residual", "parallel")
    shared = dict(file_shapes(changed(parallel, "architecture.norm.shared", True)))
    assert dict(file_shapes(parallel)).keys() - shared.keys() == {"layers.0.ffn_norm", "layers.1.ffn_norm"}


def test_predictors_have_a_rank_of_each_layer() -> None:
    have = {"layers.0.fc1": (40, 32), "layers.1.fc2": (70, 7)}
    assert list(predictor_shapes(SPEC, have)) == [
        ("layers.0.fc1", (40, 32)),
        ("layers.0.fc2", (70, 40)),
        ("layers.1.fc1", (1, 32)),
        ("layers.1.fc2", (70, 1)),
    ]
