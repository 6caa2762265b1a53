"""Descriptions of models: to JSON and back, and what is refused.  pytest tests/shared/model/test_spec.py"""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from tests.shared.model.specs import SPEC, edited
from warmfront.shared.model.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    Norm,
    Positions,
    Rotary,
)
from warmfront.shared.model.spec import ModelSpec, Predictor

# Every field is unlike its default.
RICH = ModelSpec(
    family="every one",
    name='a "name"\n',
    layers=3,
    hidden=64,
    ffn=96,
    vocab=7,
    context=1,
    architecture=Architecture(
        norm=Norm(kind="layer", epsilon=1e-12, placement="sandwich", bias=True, shared=True, final=False),
        positions=Positions(
            rotary=(
                Rotary(frequencies=(1.0, 1 / 3), magnitude=1.25, long_frequencies=(0.5, 0.25), original_context=9),
                Rotary(frequencies=(5e-324,)),
            ),
            rotary_of_layer=(1, -1, 0),
            learned_offset=2,
        ),
        attention=Attention(
            heads=4,
            kv_heads=2,
            head_dim=24,
            scale=0.1,
            qk_norm="whole",
            biases=("q", "o"),
            soft_cap=50.0,
            windows=(0, 4096, 1),
            sinks=True,
        ),
        feed_forward=FeedForward(
            gated=False,
            activation="fatrelu",
            parameter=0.01,
            biases=("up", "down"),
            experts=Experts(
                number=8,
                active=2,
                bias=True,
                scoring="sigmoid",
                normalised=True,
                scale=2.5,
                shared=40,
                shared_gate=True,
            ),
        ),
        residual="parallel",
        embedding_scale=12.0,
        residual_scale=0.5,
        logit_scale=0.25,
        logit_cap=30.0,
        tied_head=True,
    ),
    predictor=Predictor(input="normed", activation="none", threshold=-0.25),
)


@pytest.mark.parametrize("spec", [SPEC, RICH, replace(SPEC, predictor=Predictor())])
def test_json_and_back(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec


def leaves(value: Any, path: str = "") -> list[str]:
    """Paths of all fields that are no objects."""
    if not isinstance(value, dict):
        return [path]
    return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}.{name}".lstrip("."))]


def test_every_field_is_rich() -> None:
    """So that the round trip above would lose any."""
    rich, plain = json.loads(RICH.to_json()), json.loads(SPEC.to_json())
    for path in leaves(plain):
        at, other = rich, plain
        for name in path.split("."):
            at, other = at[name], other[name]
        assert at != other, path


FIELDS = leaves(json.loads(RICH.to_json()))


OPTIONAL = ("learned_offset", "scale", "qk_norm", "soft_cap", "logit_cap", "parameter")


def type_of(path: str) -> str:
    value: Any = json.loads(RICH.to_json())
    for name in path.split("."):
        value = value[name]
    return type(value).__name__


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("value", [5, 2.5, True, "text", [1, 2], [[]], {"a": 1}, None])
def test_no_field_takes_another_type(path: str, value: Any) -> None:
    """In one line that names the field; those of the right type are tried below."""
    types = {type_of(path)} | ({"int"} if type_of(path) == "float" else set())
    types |= {"NoneType"} if path.rpartition(".")[2] in OPTIONAL else set()
    if type(value).__name__ in types and value != [[]]:
        return
    with pytest.raises(ValueError, match=rf"^field {path.replace('.', '[.]')}(\[0\])? is .*, not ") as caught:
        ModelSpec.from_json(edited(RICH, path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", FIELDS)
def test_no_field_may_be_missing(path: str) -> None:
    with pytest.raises(ValueError, match=rf"^field {path} is missing$"):
        ModelSpec.from_json(edited(RICH, path, ...))


@pytest.mark.parametrize("path", ["shoe_size", "architecture.shoe_size", "architecture.feed_forward.experts.shoe_size"])
def test_no_field_may_be_unknown(path: str) -> None:
    with pytest.raises(ValueError, match=rf"^field {path} is unknown$"):
        ModelSpec.from_json(edited(RICH, path, 44))


def test_fields_of_records_in_lists_are_named() -> None:
    rotary = [{"frequencies": [1.0, "a"], "magnitude": 1.0, "long_frequencies": [], "original_context": 0}]
    with pytest.raises(ValueError, match=r"^field architecture\.positions\.rotary\[0\]\.frequencies\[1\] is 'a'"):
        ModelSpec.from_json(edited(RICH, "architecture.positions.rotary", rotary))


@pytest.mark.parametrize("text", ["", "5", "[]", "null", "{", '{"family"'])
def test_json_that_is_no_description(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        ModelSpec.from_json(text)


NAN, INF = math.nan, math.inf
HOSTILE: list[tuple[str, list[Any], str]] = [
    *((name, [0, -1, 2**31], rf"{name} is \S+, not a whole number from 1 to") for name in ("layers", "ffn")),
    *((name, [0, -1, 10**30], rf"{name} is \S+, not a whole number from 1 to") for name in ("vocab", "context")),
    ("hidden", [0, -32], "hidden is"),
    ("hidden", [33, 72], "hidden size .* is not a multiple of 32"),
    ("predictor.input", ["gate"], "predictor input 'gate' is not supported; residual and normed are"),
    ("predictor.activation", ["silu"], "predictor activation 'silu' is not supported; relu and none are"),
    ("predictor.threshold", [NAN, INF, -INF], "predictor threshold .* is not a number"),
    ("architecture.norm.kind", ["batch", "", "x" * 10**6], "norm is '.*', not one of rms, layer$"),
    ("architecture.norm.placement", ["middle"], "placement of norms is 'middle', not one of pre, post, sandwich"),
    ("architecture.norm.epsilon", [0, -1e-6, NAN, INF, 1e-60, 1e300], "norm epsilon is .*, not a positive number"),
    ("architecture.positions.rotary.0.frequencies", [[], [0.0], [-1.0], [1.0, NAN], [INF]], "rotary frequencies are"),
    ("architecture.positions.rotary.1.frequencies", [[1.0] * 13], "rotary dimension is 26, not a .* from 2 to 24$"),
    ("architecture.positions.rotary.0.long_frequencies", [[0.0, 1.0], [1.0, NAN]], "rotary frequencies are"),
    ("architecture.positions.rotary.0.long_frequencies", [[1.0]], "2 rotary frequencies have 1 for long contexts"),
    ("architecture.positions.rotary.0.original_context", [-1, 2**31], "original context is"),
    ("architecture.positions.rotary.0.magnitude", [0.0, NAN, INF, -1.0], "rotary magnitude is"),
    ("architecture.positions.rotary_of_layer", [[2, 0, 0], [0, -2, 0]], "rotary table of a layer is"),
    ("architecture.positions.rotary_of_layer", [[0], [0, 0, 0, 0]], "rotary tables are given for . layers of 3$"),
    ("architecture.positions.learned_offset", [-1, 2**31], "offset of learned positions is"),
    ("architecture.attention.heads", [0, -4, 2**31], "number of heads is"),
    ("architecture.attention.kv_heads", [0, -1, 2**31], "number of key-value heads is"),
    ("architecture.attention.kv_heads", [3], "4 heads do not share 3 key-value heads"),
    ("architecture.attention.head_dim", [20, 10**9 + 1], "heads x head size .* is not a multiple of 32"),
    ("architecture.attention.head_dim", [-16, 2**31], "head size is .*, not a whole number from 0 to"),
    ("architecture.attention.head_dim", [0], "head size .* is not a multiple of 8"),
    ("architecture.attention.scale", [0.0, -1.0, NAN, INF], "attention scale is"),
    ("architecture.attention.qk_norm", ["", "heads"], "q/k norm is '.*', not one of head, whole"),
    ("architecture.attention.soft_cap", [0.0, -1.0, NAN, INF], "attention soft cap is"),
    ("architecture.attention.biases", [["q", "q"], ["o", "q"], ["gate"], [""]], "attention biases are"),
    ("architecture.attention.windows", [[0, -1, 0], [2**31, 0, 0]], "attention window is"),
    ("architecture.attention.windows", [[0], [0] * 4], "attention windows are given for . layers of 3$"),
    ("architecture.feed_forward.activation", ["fat", ""], "activation is '.*', not one of silu, relu, gelu"),
    (
        "architecture.feed_forward.activation",
        ["relu"],
        "relu with parameter 0.01: fatrelu and swiglu_oai alone have one",
    ),
    ("architecture.feed_forward.activation", ["drelu"], "the activation drelu needs a gate"),
    ("architecture.feed_forward.parameter", [NAN, INF, -INF, 1e300], "parameter is .*, not a finite number"),
    ("architecture.feed_forward.biases", [["gate"], ["down", "up"], ["q"]], "feed-forward biases are"),
    ("architecture.feed_forward.experts.number", [0, 2**14 + 1], "number of experts is"),
    ("architecture.feed_forward.experts.active", [0, 9], "number of active experts is .*, not a .* from 1 to 8$"),
    ("architecture.feed_forward.experts.scoring", ["top"], "scoring of experts is 'top', not one of softmax, sigmoid$"),
    ("architecture.feed_forward.experts.scale", [0.0, math.inf], "factor on the experts' weights is"),
    ("architecture.feed_forward.experts.shared", [-1], "neurons of the shared expert is"),
    ("architecture.feed_forward.experts.shared", [0], "a gate for a shared expert, but no shared expert$"),
    ("architecture.residual", ["none"], "residual is 'none', not one of serial, parallel"),
    ("architecture.embedding_scale", [0.0, -1.0, NAN, INF], "embedding scale is"),
    ("architecture.residual_scale", [0.0, -1.0, NAN, INF], "residual scale is"),
    ("architecture.logit_scale", [0.0, -1.0, NAN, INF], "logit scale is"),
    ("architecture.logit_cap", [0.0, -1.0, NAN, INF], "logit soft cap is"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), [(path, value, message) for path, values, message in HOSTILE for value in values]
)
def test_values_that_no_model_can_have(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ModelSpec.from_json(edited(RICH, path, value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
