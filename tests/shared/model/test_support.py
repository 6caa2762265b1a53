"""What can be described but is not computed.  pytest tests/shared/model/test_support.py"""

from dataclasses import replace
from typing import Any

import pytest

from tests.shared.model.specs import SPEC, changed
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Experts, FeedForward, Positions, Rotary
from warmfront.shared.model.spec import Predictor
from warmfront.shared.model.support import _UNSUPPORTED, check_supported

FULL = SPEC.architecture.positions.rotary[0]
OTHER = Rotary(frequencies=(0.5,) * 8)
EXPERTS = Experts(number=8, active=2)
UNSUPPORTED: dict[str, tuple[str, Any]] = {
    "parallel residual with post-norm": ("residual", "parallel"),
    "layers without experts wider than all experts": (
        "feed_forward.experts",
        replace(EXPERTS, dense_layers=(1,), dense=1 << 16),
    ),
    "predictors beside shared experts or layers without experts": (
        "feed_forward.experts",
        replace(EXPERTS, shared=40),
    ),
}


def test_every_feature_of_the_table_is_tried() -> None:
    assert list(UNSUPPORTED) == [words for words, _ in _UNSUPPORTED]


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_each_is_refused_by_its_name(words: str) -> None:
    path, value = UNSUPPORTED[words]
    spec = changed(SPEC, "architecture.norm.placement", "post") if path == "residual" else SPEC
    spec = replace(spec, predictor=Predictor() if words.startswith("predictors") else None)
    with pytest.raises(ModelError) as caught:
        check_supported(changed(spec, f"architecture.{path}", value))
    verb = "are" if words.endswith("s") else "is"
    assert str(caught.value) == f"by hand uses {words}, which {verb} not supported yet"


def test_several_are_named_in_one_line() -> None:
    words = "predictors beside shared experts or layers without experts"
    path, experts = UNSUPPORTED[words]
    spec = replace(changed(SPEC, f"architecture.{path}", experts), predictor=Predictor())
    spec = changed(changed(spec, "architecture.norm.placement", "post"), "architecture.residual", "parallel")
    with pytest.raises(ModelError) as caught:
        check_supported(spec)
    several = f"parallel residual with post-norm and {words}, which are not supported yet"
    assert str(caught.value) == f"by hand uses {several}"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attention.scale", 0.5),
        ("attention.biases", ("q", "k", "v")),
        ("attention.windows", (0, 4096)),
        ("positions.rotary_of_layer", (0, 0)),
        ("positions.rotary", (Rotary(frequencies=(0.5,) * 8, magnitude=1.2),)),
        ("feed_forward.activation", "gelu_tanh"),
        ("feed_forward", FeedForward(activation="fatrelu", parameter=0.01)),
        ("feed_forward", FeedForward(activation="drelu")),
        ("feed_forward.experts", Experts(number=8, active=2, scoring="sigmoid", shared=40, shared_gate=True)),
        ("feed_forward", FeedForward(activation="silu", experts=EXPERTS, biases=("gate", "up", "down"))),
        ("feed_forward", FeedForward(activation="swiglu_oai", parameter=7.0)),
        ("attention.sinks", True),
        ("tied_head", True),
        ("norm.kind", "layer"),
        ("norm.placement", "post"),
        ("norm.placement", "sandwich"),
        ("norm.placement", "sum"),
        ("norm.bias", True),
        ("norm.final", False),
        ("positions", Positions(learned_offset=2)),
        ("positions", Positions()),
        ("positions", Positions(rotary=(FULL,), rotary_of_layer=(0, -1))),
        ("positions", Positions(rotary=(FULL, OTHER), rotary_of_layer=(0, 1))),
        ("positions", Positions(rotary=(Rotary(frequencies=(1.0, 0.5)),))),
        ("attention.qk_norm", "head"),
        ("attention.qk_norm", "whole"),
        ("attention.soft_cap", 50.0),
        ("residual", "parallel"),
        ("feed_forward.gated", False),
        ("feed_forward.biases", ("gate", "down")),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.2),
        ("logit_scale", 0.1),
        ("logit_cap", 30.0),
    ],
)
def test_what_is_computed(path: str, value: Any) -> None:
    check_supported(SPEC)
    check_supported(changed(SPEC, f"architecture.{path}", value))
