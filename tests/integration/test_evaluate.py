"""`warmfront eval` against transformers and float64: losses, divergence, agreement, which neurons were found.

Run: pytest tests/integration/test_evaluate.py
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.command import assert_refused, prepack, run, run_anew
from tests.integration.reference import all_logits, llama_from_folder
from warmfront.coordinator import Engine
from warmfront.coordinator.measure import evaluate as module
from warmfront.coordinator.measure.evaluate import Span, evaluate
from warmfront.coordinator.measure.evaluation_report import render
from warmfront.coordinator.measure.forced_decode import _found
from warmfront.coordinator.profile.sample_text import SAMPLE_TEXT
from warmfront.coordinator.selectors.calibration import masses
from warmfront.shared.errors import UsageError
from warmfront.shared.kernels.lowbit import pack_lowbit, unpack_lowbit
from warmfront.shared.model.branches import bounds_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.paths import cache_root

CONTEXT, FORCED_FROM = 96, 20
SPAN = Span(CONTEXT, FORCED_FROM)
TEXTS = [("first", SAMPLE_TEXT[:500]), ("second", SAMPLE_TEXT[600:800])]

pytestmark = pytest.mark.usefixtures("compiled")
Make = Callable[..., Path]


def no_progress(*_: object) -> None:
    pass


def evaluated(model: Path, wishes: Sequence[str], span: Span = SPAN, **overrides: Any) -> dict[str, Any]:
    return evaluate(
        str(model), TEXTS, wishes, {"dtype": "f32", **overrides}, span, no_progress, no_progress, no_progress
    )


def pieces_of(model: Path) -> list[list[int]]:
    """As `evaluate` is to cut the texts."""
    with Engine.load(str(model), dtype="f32") as engine:
        ids = [engine.tokenizer.encode(text) for _, text in TEXTS]
    cut = [some[at : at + CONTEXT] for some in ids for at in range(0, len(some), CONTEXT)]
    return [piece for piece in cut if len(piece) > FORCED_FROM + 1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(1, keepdims=True)))


def loss_of(logprobs: Sequence[np.ndarray], pieces: Sequence[Sequence[int]]) -> float:
    """`logprobs`: behind all decoded tokens but the last."""
    return -float(
        np.mean(
            [
                row[token]
                for each, ids in zip(logprobs, pieces, strict=True)
                for row, token in zip(each, ids[FORCED_FROM + 1 :], strict=True)
            ]
        )
    )


@pytest.fixture(scope="module")
def relu(tiny_llama: Make) -> Path:
    return tiny_llama(hidden_act="relu", intermediate_size=80)


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_dense_loss_is_that_of_transformers(tiny_llama: Make, act: str) -> None:
    model = tiny_llama(hidden_act=act, intermediate_size=80)
    pieces, reference = pieces_of(model), llama_from_folder(model)
    expected = [log_softmax(all_logits(reference, ids))[FORCED_FROM:-1] for ids in pieces]
    result = evaluated(model, ["auto"])
    dense, auto = result["rows"]
    assert result["pieces"] == len(pieces) > 2
    assert result["tokens"] == sum(map(len, expected))
    assert dense["loss"] == pytest.approx(loss_of(expected, pieces), abs=1e-5)
    assert result["perplexity"]["dense"] == pytest.approx(np.exp(loss_of(expected, pieces)), rel=1e-5)
    assert (dense["kept"], dense["agreement"], dense["divergence"], dense["recall_by_mass"]) == (1, 1, 0, 1)
    # Of ReLU `exact`, which computes those that fire, and loses nothing.
    assert auto["loss"] == pytest.approx(dense["loss"], abs=1e-5)
    assert auto["divergence"] < 1e-6
    assert auto["agreement"] == 1
    assert auto["recall_by_mass"] > 0.99999
    if act == "relu":
        fired = np.mean(list(fired_in(reference, pieces)), axis=0)
        assert [layer["kept"] for layer in auto["layers"]] == pytest.approx(fired.tolist(), abs=1e-3)
        assert auto["recall"] > 0.9999


def fired_in(reference: Any, pieces: Sequence[Sequence[int]]) -> Iterator[list[float]]:
    """Of each decoded token the shares of the neurons that fire, by layer."""
    shares: list[np.ndarray] = []
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(
            lambda _module, _input, gates: shares.append((gates[0] > 0).float().mean(1).numpy())
        )
        for layer in reference.model.layers
    ]
    for ids in pieces:
        shares.clear()
        all_logits(reference, ids)
        yield from np.stack(shares, axis=1)[FORCED_FROM:-1].tolist()
    for hook in hooks:
        hook.remove()


def test_a_lossy_selector(relu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against logits of the same runs, compared in float64, and for the first layer, whose input no selector has
    changed, against transformers' gates and the thresholds."""
    for name in ("_LOOKED_AT", "_PIECES_LOOKED_AT"):
        monkeypatch.setattr(module, name, 1000)
    result = evaluated(relu, ["lowbit:0.7"], bits=1)
    row = result["rows"][1]
    pieces, logprobs = pieces_of(relu), {}
    for selector in ("all", "lowbit"):
        with Engine.load(str(relu), dtype="f32", selector=selector, bits=1, recall=0.7) as engine:
            runs = (np.array(list(engine.forced_logits(ids, FORCED_FROM)))[1:-1] for ids in pieces)
            logprobs[selector] = [log_softmax(logits) for logits in runs]
            lowbit = engine.session.runtime.lowbit
            thresholds = None if lowbit is None else lowbit.thresholds[0].copy()
    dense, sparse = (np.concatenate(logprobs[selector]) for selector in ("all", "lowbit"))
    assert row["loss"] == pytest.approx(loss_of(logprobs["lowbit"], pieces), abs=1e-6)
    assert row["divergence"] == pytest.approx((np.exp(dense) * (dense - sparse)).sum(1).mean(), rel=1e-4)
    assert row["divergence"] > 1e-3
    assert row["agreement"] == pytest.approx((dense.argmax(1) == sparse.argmax(1)).mean(), abs=1e-6)
    more = np.concatenate(
        [
            (full - part)[np.arange(len(full)), ids[FORCED_FROM + 1 :]]
            for full, part, ids in zip(logprobs["all"], logprobs["lowbit"], pieces, strict=True)
        ]
    )
    assert row["loss_above_dense"] == pytest.approx(more.mean(), abs=1e-6)
    assert row["standard_error"] == pytest.approx(more.std() / len(more) ** 0.5, rel=1e-3)

    assert thresholds is not None
    kept, recall, by_mass = found_in_first_layer(relu, pieces, thresholds.reshape(-1))
    layer = row["layers"][0]
    assert layer["kept"] == pytest.approx(kept, abs=2e-3)
    assert layer["recall"] == pytest.approx(recall, abs=5e-3)
    assert layer["recall_by_mass"] == pytest.approx(by_mass, abs=5e-3)
    assert 0.5 < by_mass < 0.95


def found_in_first_layer(
    model: Path, pieces: Sequence[Sequence[int]], thresholds: np.ndarray
) -> tuple[float, float, float]:
    """Share of neurons above the thresholds, of those that fire, of their mass, over all decoded tokens."""
    reference = llama_from_folder(model)
    mlp, inputs = reference.model.layers[0].mlp, []
    hook = mlp.register_forward_hook(lambda _module, given, _output: inputs.append(given[0][0]))
    for ids in pieces:
        all_logits(reference, ids)
    hook.remove()
    x = torch.cat([each[FORCED_FROM:-1] for each in inputs]).double()
    gate, up, down = (matrix.weight.detach().double() for matrix in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gates = (x @ gate.T).numpy()
    mass = np.abs(np.maximum(gates, 0) * (x @ up.T).numpy()) * down.norm(dim=0).numpy()
    with Engine.load(str(model), dtype="f32", selector="lowbit", bits=1, recall=0.7) as engine:
        order = order_of(engine, gate.float().numpy())
    copies = unpack_lowbit(pack_lowbit(gate.float().numpy(), 1), 1, gate.shape[1])
    selected = x.numpy() @ copies.T > thresholds[order]
    return (
        float(selected.mean()),
        float((selected & (gates > 0)).sum() / (gates > 0).sum()),
        float(mass[selected].sum() / mass.sum()),
    )


def order_of(engine: Engine, gates: np.ndarray) -> np.ndarray:
    """Where in the packed model's first layer the published neurons are."""
    from warmfront.coordinator.selectors.lowbit import groups_of, rows_of

    packed = rows_of(engine.model, groups_of(engine.model, 0), 0)
    return np.array([int(np.abs(packed - row).sum(1).argmin()) for row in gates])


def test_keys_and_values_and_mixtures(tiny_family: Make) -> None:
    """Narrow keys and values count as a loss too, against the usual ones. Without a tokenizer it is the model's own
    text; and nothing is missed of the experts that are used."""
    arguments = {"dtype": "f32", "kv": "q8"}, SPAN, no_progress, no_progress, no_progress
    result = evaluate(str(tiny_family("mixtral")), [], ["all"], *arguments)
    dense, narrow = result["rows"]
    assert narrow["divergence"] > 0
    # 2 of 5 experts.
    assert dense["kept"] == narrow["kept"] == 0.4
    assert narrow["recall_by_mass"] == 1


def test_of_a_mixture_neurons_of_the_experts_that_are_used_count(tiny_family: Make) -> None:
    rng = np.random.default_rng(0)
    with Engine.load(str(tiny_family("mixtral", hidden_act="relu")), dtype="f32", gpu="none") as engine:
        model = engine.model
        bounds, shape = bounds_of(model.spec), (9, model.spec.layers)
        inputs = rng.standard_normal((*shape, model.spec.hidden), np.float32)
        words = rng.integers(0, 1 << 32, (*shape, model.layout.groups), np.uint32)
        uses = (rng.random((*shape, len(bounds) - 1)) < 0.4).astype(np.uint8)
        found = _found(model, inputs, words, uses)
        for layer, sums in enumerate(found):
            mass = masses(model, layer, inputs[:, layer].copy())
            mass[~np.repeat(uses[:, layer] != 0, GROUP * np.diff(bounds), axis=1)] = 0
            bits = np.unpackbits(words[:, layer].copy().view(np.uint8), axis=1, bitorder="little") != 0
            expected = (mass > 0).sum(), ((mass > 0) & bits).sum(), mass.sum(), mass[bits].sum()
            np.testing.assert_allclose(sums, expected, rtol=1e-5)
        assert 0 < found[:, 1].sum() < found[:, 0].sum()


def folders() -> list[Path]:
    return list((cache_root() / "models").glob("*.eval"))


@pytest.fixture(scope="module")
def whole(relu: Path) -> dict[str, Any]:
    """An evaluation that nothing has interrupted."""
    result = evaluated(relu, ["exact", "lowbit:0.9"])
    assert folders() == []
    return result


@pytest.mark.parametrize("when", [150, 700])
def test_an_interrupted_evaluation_goes_on(relu: Path, whole: dict[str, Any], when: int) -> None:
    """In the dense run and behind it: with the same numbers, and from the last piece on; in the end nothing is left."""

    def interrupt(_what: str, done: int, _total: int) -> None:
        if done == when:
            raise KeyboardInterrupt

    arguments = str(relu), TEXTS, ["exact", "lowbit:0.9"], {"dtype": "f32"}, SPAN
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, no_progress, no_progress, interrupt)
    assert len(folders()) == 1
    said: list[str] = []
    again = evaluate(*arguments, said.append, no_progress, no_progress)
    for row, expected in zip(again["rows"], whole["rows"], strict=True):
        assert row | {"decode_tps": 0} == expected | {"decode_tps": 0}
    assert folders() == []
    (line,) = (line for line in said if line.startswith("going on after "))
    assert 0 < when - int(line.split()[3]) <= CONTEXT - FORCED_FROM - 1
    assert any("decoding" in line and "about" in line for line in said)


def test_the_table(whole: dict[str, Any]) -> None:
    head, columns, *rows = render(whole)
    assert f"{whole['tokens']:,} tokens" in head
    assert columns.split("  ")[0] == "selector"
    assert [row.split()[0] for row in rows] == ["dense", "exact", "lowbit:0.9", "exact:", "lowbit:0.9:"]
    assert f"{whole['perplexity']['exact']:.3f}" in rows[1]


def test_another_text_removes_what_was_left(relu: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for span in (SPAN, SPAN._replace(forced_from=10)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(str(relu), TEXTS, ["exact"], {"dtype": "f32"}, span, no_progress, no_progress, interrupt)
        assert len(folders()) == 1
    evaluated(relu, ["exact"], SPAN._replace(tokens=60))
    assert folders() == []


def test_the_command(relu: Path, tmp_path: Path) -> None:
    prepack(relu)
    text, plot = tmp_path / "text.txt", tmp_path / "plot.svg"
    text.write_text(SAMPLE_TEXT[:300])
    outcome = run_anew(
        "eval", relu, "--text", text, "--selector=exact,lowbit:0.9", "--ctx=100", "--plot", plot, "--json"
    )
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert list(result["perplexity"]) == ["dense", "exact", "lowbit:0.9"]
    assert result["texts"] == ["text.txt"]
    assert "about" in outcome.err
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("span", "wish", "words"),
    [
        (Span(20, 19), "exact", ["pieces of 20", "--forced-from"]),
        (Span(None, 490), "exact", ["the first 490 are prefilled", "give more"]),
        (SPAN, "lowrank", ["lowrank", "no predictors"]),
        (Span(5000), "exact", ["--ctx 5000"]),
    ],
)
def test_what_cannot_be_evaluated(relu: Path, span: Span, wish: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        evaluated(relu, [wish], span)
    for word in words:
        assert word in str(error.value)
    assert folders() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text=absent.txt"], ["absent.txt"]),
        (["--selector=some"], ["'some'", "lowbit"]),
        (["--selector=exact:0.5"], ["exact:0.5"]),
        (["--forced-from=0"], ["0"]),
        (["--plot=absent/x.png"], ["there is no folder absent"]),
        (["--gpu=rocm"], ["rocm"]),
    ],
)
def test_refusals(options: list[str], words: list[str]) -> None:
    assert_refused(run("eval", "no-model", *options), 2, *words)
