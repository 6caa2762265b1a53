"""The selector `core` against transformers: scores, masks, logits, when it is chosen again and when given up.

Run: pytest tests/integration/test_core.py
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.integration.command import assert_refused, needs_two_cores, prepack, run
from tests.integration.reference import all_logits, llama_from_folder
from warmfront.coordinator import Engine
from warmfront.coordinator.cli.profile import read_texts
from warmfront.coordinator.measure.clustering import cluster_texts, texts_in
from warmfront.coordinator.selectors.clusters import load_clusters
from warmfront.coordinator.selectors.core import bits_of, largest
from warmfront.coordinator.selectors.lowbit import groups_of, rows_of
from warmfront.shared.errors import UsageError

SHAPE = {"num_hidden_layers": 3, "intermediate_size": 200, "max_position_embeddings": 512}
KEEP = 0.3
Reals = np.ndarray

pytestmark = pytest.mark.usefixtures("compiled")


def text(count: int, vocab: int = 256) -> list[int]:
    return [int(token) for token in np.random.default_rng(5).integers(0, vocab, count)]


@contextmanager
def hooked(reference: Any, change: Any) -> Iterator[None]:
    """`change(layer, h)` gets the input of each down projection [1, tokens, neurons] and returns what it becomes."""
    with ExitStack() as stack:
        for layer, block in enumerate(reference.model.layers):
            handle = block.mlp.down_proj.register_forward_pre_hook(lambda _m, args, at=layer: (change(at, args[0]),))
            stack.callback(handle.remove)
        yield


def factors_of(reference: Any, ids: Sequence[int]) -> Reals:
    """h of each layer, token and neuron, float64 [layers, tokens, neurons]."""
    seen: dict[int, Reals] = {}

    def keep(layer: int, h: torch.Tensor) -> torch.Tensor:
        seen[layer] = h[0].detach().double().numpy()
        return h

    with hooked(reference, keep):
        all_logits(reference, ids)
    return np.array([seen[layer] for layer in sorted(seen)])


def scores_of(h: Reals, reference: Any, score: str) -> Reals:
    """As `selectors/core.py` says, in float64: [layers, neurons]."""
    h = np.abs(h)
    if score == "norm":
        lengths = [block.mlp.down_proj.weight.detach().double().norm(dim=0).numpy() for block in reference.model.layers]
        weighed = (h * np.array(lengths)[:, None]) ** 2
        return (weighed / weighed.sum(2, keepdims=True)).sum(1)
    counts = np.zeros((len(h), h.shape[2]))
    for layer, rows in enumerate(h):
        for row in rows:
            count = int(np.ceil(0.4 * np.count_nonzero(row)))
            counts[layer] += row >= np.sort(row)[-count]
    return counts


def in_file_order(engine: Engine, reference: Any, values: Reals) -> Reals:
    """`values` [layers, neurons] of the packed order, in that of the folder: found by the gate rows."""
    out = np.empty((len(values), SHAPE["intermediate_size"]), values.dtype)
    for layer, block in enumerate(reference.model.layers):
        gates = rows_of(engine.model, groups_of(engine.model, layer), 0)
        place = {row.tobytes(): at for at, row in enumerate(gates)}
        weights = block.mlp.gate_proj.weight.detach().numpy()
        out[layer] = values[layer, [place[row.tobytes()] for row in weights]]
    return out


def core_of(engine: Engine, reference: Any) -> Reals:
    """The core on the board, bool [layers, neurons] in the folder's order."""
    words = engine.session.runtime.board.mask[0]
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)
    return in_file_order(engine, reference, bits)


def masked_logits(reference: Any, ids: Sequence[int], core: Reals, dense: int) -> Reals:
    """Logits behind each token, if those from the `dense`-th on compute only the core."""

    def masked(layer: int, h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[0, dense:, torch.from_numpy(~core[layer])] = 0
        return h

    with hooked(reference, masked):
        return all_logits(reference, ids)


def assert_core(engine: Engine, core: Reals, scores: Reals) -> None:
    """It is the highest scores, but where they differ by less than what noting them may change."""
    assert engine.session.core is not None
    assert engine.session.core.whole is not None
    count = round(KEEP * scores.shape[1])
    for whole, chosen, row in zip(engine.session.core.whole, core, scores, strict=True):
        assert chosen.sum() == (len(row) if whole else count)
        assert row[chosen].sum() > 0.995 * np.sort(row)[-count:].sum()


@pytest.mark.parametrize(
    ("activation", "overrides"),
    [
        ("silu", {"core_score": "norm"}),
        ("relu", {"core_score": "positive"}),
        ("silu", {"core_score": "positive", "gpu": "host", "vram_budget": 1_000_000}),
        pytest.param("relu", {"core_score": "norm", "workers": 2}, marks=needs_two_cores),
    ],
    ids=["norm", "positive", "emulated GPU", "two workers"],
)
def test_scores_core_and_logits(tiny_llama: Any, activation: str, overrides: dict[str, Any]) -> None:
    folder: Path = tiny_llama(hidden_act=activation, **SHAPE)
    reference, ids, prompt = llama_from_folder(folder), text(316), 300
    expected = scores_of(factors_of(reference, ids[:prompt])[:, -288:], reference, overrides["core_score"])
    with Engine.load(str(folder), selector="core", dtype="f32", keep=KEEP, verify=True, **overrides) as engine:
        before = sum(worker.neurons for worker in engine.statistics.workers())
        got = np.array(list(engine.forced_logits(ids, prompt)))
        assert engine.session.core is not None
        scores, core = in_file_order(engine, reference, engine.session.core.scores), core_of(engine, reference)
        computed = sum(worker.neurons for worker in engine.statistics.workers()) - before
        engine.reset()
        stepped = engine.step(ids[0]).copy()
        list(engine.forced_logits(ids[:prompt], prompt))
        alone = next(engine.forced_logits(ids[:1], 1))
    for first in (stepped, alone):
        np.testing.assert_allclose(first, all_logits(reference, ids[:1])[0], atol=1e-3 * np.abs(got).max())
    # Of bfloat16 numbers; a count changes where two factors round to the same.
    tolerance = {"rtol": 0.01} if overrides["core_score"] == "norm" else {"atol": 10}
    np.testing.assert_allclose(scores, expected, **tolerance)
    assert_core(engine, core, expected)
    logits = masked_logits(reference, ids, core, prompt)[prompt - 1 :]
    assert np.abs(got - logits).max() < 1e-3 * np.abs(logits).max()
    assert 0 < computed <= core.sum() * (len(ids) - prompt) + (32 - 200 % 32) * len(core) * (len(ids) - prompt)


def test_the_gpu_takes_the_groups_of_the_core(tiny_llama: Any) -> None:
    folder = tiny_llama(**SHAPE)
    gpu = {"gpu": "host", "vram_budget": 1_000_000, "policy": "core"}
    with Engine.load(str(folder), selector="core", dtype="f32", keep=KEEP, verify=True, **gpu) as engine:
        list(engine.forced_logits(text(330), 300))
        runtime = engine.session.runtime
        counts, held = np.bitwise_count(runtime.board.mask[0]), runtime.ownership.resident[1]
        np.testing.assert_array_equal(runtime.ownership.owners() == 1, held)
    assert 0 < held.sum() < held.size
    np.testing.assert_array_equal(np.sort(counts[held]), np.sort(counts, axis=None)[-held.sum() :])


def test_a_policy_for_cores_needs_one(tiny_llama: Any) -> None:
    for selector in ("all", "core|lowbit"):
        with pytest.raises(UsageError, match=r"--policy core, but the selector is .*: add --selector core"):
            Engine.load(str(tiny_llama(**SHAPE)), policy="core", selector=selector)


def test_a_short_prompt_is_computed_whole_until_the_text_tells(tiny_llama: Any) -> None:
    """What it computes is what transformers computes, until the core of the first hundred tokens is known."""
    folder = tiny_llama(hidden_act="relu", **SHAPE)
    reference, ids, prompt = llama_from_folder(folder), text(330), 40
    with Engine.load(str(folder), selector="core", dtype="f32", keep=KEEP) as engine:
        steps = engine.forced_logits(ids, prompt)
        got = np.array([next(steps) for _ in range(60)])
        assert engine.session.core is not None
        assert engine.session.core.facts.chosen == 0
        rest = np.array(list(steps))
        facts = engine.session.core.facts
    expected = all_logits(reference, ids)[prompt - 1 :]
    assert np.abs(got - expected[:60]).max() < 1e-3 * np.abs(expected).max()
    assert facts.chosen == 1
    assert facts.overlap is not None
    assert np.abs(rest[-1] - expected[-1]).max() > 1e-3 * np.abs(expected).max()


def test_refresh(tiny_llama: Any) -> None:
    """The tokens since are read again: they score, and what of them was computed by the core alone is replaced."""
    folder = tiny_llama(**SHAPE)
    reference, ids, prompt, refresh = llama_from_folder(folder), text(340), 300, 16
    options = {"dtype": "f32", "keep": KEEP, "refresh": refresh}
    with Engine.load(str(folder), selector="core", **options) as engine:
        got = np.array(list(engine.forced_logits(ids, prompt)))
        assert engine.session.core is not None
        scores, core = in_file_order(engine, reference, engine.session.core.scores), core_of(engine, reference)
        assert engine.session.core.facts.chosen == 3
        over = engine.generate(ids[:prompt], ignore_eos=True)
        next(over)
        steps = engine.forced_logits(ids, prompt)
        again = [next(steps) for _ in range(refresh + 1)]
        with pytest.raises(UsageError, match="this text is over"):
            next(over)
        again += steps
    assert (got == np.array(again)).all(), "the text alone decides, and no other that is over"
    end = prompt + 2 * refresh
    h = factors_of(reference, ids[:end])
    expected = scores_of(h[:, prompt - 288 : prompt], reference, "norm")
    for first in range(prompt, end, refresh):
        expected = expected * (288 - refresh) / 288 + scores_of(h[:, first : first + refresh], reference, "norm")
    np.testing.assert_allclose(scores, expected, rtol=0.01)
    assert_core(engine, core, expected)
    # Behind it all tokens before are exact again.
    logits = masked_logits(reference, ids, core, end)[end:]
    assert np.abs(got[end - prompt + 1 :] - logits).max() < 1e-3 * np.abs(logits).max()


def test_a_core_that_loses_too_much_is_given_up(tiny_llama: Any) -> None:
    folder = tiny_llama(**SHAPE)
    reference, ids, prompt = llama_from_folder(folder), text(310), 300
    expected = all_logits(reference, ids)[prompt - 1 :]
    drifts = {}
    for limit in (0.0, 50.0):
        with Engine.load(str(folder), selector="core", dtype="f32", keep=KEEP, max_loss=limit) as engine:
            got = np.array(list(engine.forced_logits(ids, prompt)))
            assert engine.session.core is not None
            core, facts = core_of(engine, reference), engine.session.core.facts
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert (facts.given_up, core.all(), error < 1e-3) == ((1, True, True) if limit == 0 else (0, False, False))
        drifts[limit] = facts.drift
    assert drifts[0.0] == pytest.approx(drifts[50.0])
    kept = masked_logits(reference, ids[:prompt], core, prompt - 16)[-16:].astype(np.float64)
    p, q = (torch.from_numpy(each).log_softmax(1) for each in (all_logits(reference, ids[:prompt])[-16:] * 1.0, kept))
    assert drifts[0.0] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=0.02)


def test_unions_compute_the_neurons_of_both(tiny_llama: Any) -> None:
    folder = tiny_llama(hidden_act="relu", **SHAPE)
    ids, prompt, seen, losses = text(304), 300, {}, {}
    for selector in ("core", "lowbit", "core|lowbit"):
        with Engine.load(str(folder), selector=selector, dtype="f32", keep=KEEP, recall=0.9) as engine:
            list(engine.forced_logits(ids, prompt))
            seen[selector] = engine.session.runtime.board.mask[0].copy()
            losses[selector] = len(list(engine.model.path.parent.glob(f"{engine.model.path.stem}-core-*.npz")))
    assert losses["core|lowbit"] == losses["core"] + 1, "what a union's layers lose is less"
    both = seen["core"] | seen["lowbit"]
    # Of one layer: what enters the others depends on what was computed before.
    assert (seen["core|lowbit"][0] == both[0]).all()
    assert (seen["core"] & ~seen["core|lowbit"] == 0).all()
    assert both[0].tolist() != seen["core"][0].tolist()


def test_a_union_with_predictors_in_transformers(tiny_llama: Any, tmp_path: Path) -> None:
    """Each token computes the core and what its predictors choose, by float64 of the input that the layer has."""
    folder, rank = tiny_llama(hidden_act="relu", **SHAPE), 16
    reference, ids, prompt, rng = llama_from_folder(folder), text(316), 300, np.random.default_rng(2)
    shapes = {"fc1.weight": (rank, 64), "fc2.weight": (200, rank), "fc2.bias": (200,)}
    made = {
        f"layers.{layer}.{part}": rng.normal(-(part == "fc2.bias"), 1, shape).astype(np.float32)
        for layer in range(3)
        for part, shape in shapes.items()
    }
    save_file(made, tmp_path / "predictor", {"input": "normed", "activation": "none"})
    options = {"selector": "core|lowrank", "predictor": str(tmp_path / "predictor"), "dtype": "f32", "keep": KEEP}
    with Engine.load(str(folder), **options, gpu="host", vram_budget=1_000_000, verify=True) as engine:
        got = np.array(list(engine.forced_logits(ids, prompt)))
        session = engine.session
        assert session.core is not None
        words = bits_of(session.core._largest(session.core.scores))
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)
        core = in_file_order(engine, reference, bits)
    predicted: dict[int, Reals] = {}

    def predict(layer: int, x: torch.Tensor) -> None:
        fc1, fc2, bias = (made[f"layers.{layer}.{part}"].astype(np.float64) for part in shapes)
        predicted[layer] = x[0].detach().double().numpy() @ fc1.T @ fc2.T + bias > 0

    def masked(layer: int, h: torch.Tensor) -> torch.Tensor:
        computed = torch.from_numpy(core[layer] | predicted[layer])
        computed[:prompt] = True
        return h * computed

    with ExitStack() as stack, hooked(reference, masked):
        for layer, block in enumerate(reference.model.layers):
            hook = block.mlp.register_forward_pre_hook(lambda _m, args, at=layer: predict(at, args[0]))
            stack.callback(hook.remove)
        expected = all_logits(reference, ids)[prompt - 1 :]
    share = np.mean([each[prompt:].mean() for each in predicted.values()])
    assert 0.1 < share < 0.6
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_short_prompt_gets_the_core_of_its_kind(tiny_llama: Any, tmp_path: Path) -> None:
    """Kinds of text are found by `warmfront cluster`; a prompt that has no core of its own takes that of its kind."""
    folder = tiny_llama(**SHAPE, seed=3)
    for name, words in (("a.txt", "0123456789 "), ("b.md", "zyxwvu tsr")):
        (tmp_path / name).write_text("".join(np.random.default_rng(1).choice(list(words), 900)), encoding="utf-8")
    texts = read_texts(texts_in([tmp_path]))
    facts = cluster_texts(str(folder), texts, {"dtype": "f32"}, print, lambda _what, _done, _total: None)
    assert sum(facts["clusters"]) == facts["pieces"] >= 2
    assert Path(facts["file"]).exists()
    with Engine.load(str(folder), selector="core", dtype="f32", keep=KEEP) as engine:
        clusters = load_clusters(engine.model, "norm", (3, engine.model.layout.groups * 32))
        assert clusters is not None
        next(engine.forced_logits(text(40), 40))
        assert engine.session.core is not None
        assert engine.session.core.facts.chosen == 1
        core = core_of(engine, llama_from_folder(folder))
        kinds = [largest(each.astype(np.float64), KEEP, 200)[:, :200] for each in clusters.scores]
        whole = engine.session.core.whole
        assert whole is not None
        assert any((core[~whole] == kind[~whole]).all() for kind in kinds)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--selector=core", "--keep=0"], ["keep", "0.0"]),
        (["--selector=core", "--refresh=3"], ["--refresh 8"]),
        (["--selector=core|lowrank"], ["core|lowrank", "no predictors", "core"]),
        (["--selector=core", "--speculate=ngram"], ["--speculate", "core"]),
    ],
)
def test_refusals(tiny_llama: Any, options: list[str], words: list[str]) -> None:
    model = prepack(tiny_llama(hidden_act="relu", **SHAPE))
    assert_refused(run("generate", "-m", model, "-p", "Hello", "-n2", *options), 2, *words)
