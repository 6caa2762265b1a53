"""`warmfront profile` against transformers' gates, and models in order against the same ones out of order.

Run: pytest tests/integration/test_profile_cli.py
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.command import WARMFRONT, assert_refused, link_cache, prepack, run, run_anew
from tests.integration.reference import llama_from_folder
from tests.integration.terminal import CTRL_C, Terminal
from warmfront.coordinator import Engine
from warmfront.coordinator.engine.load import open_for_profiling
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.profile.counts import Profile
from warmfront.coordinator.profile.sample_text import SAMPLE_TEXT
from warmfront.coordinator.selectors.lowbit import groups_of, rows_of
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.config import EngineConfig
from warmfront.shared.model.store import PackedModel

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SHAPE = {"hidden": 256, "layers": 3, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31, "topics": 4}
JOB, SEGMENT = 288, 32
FIRST_LOAD = "profiling which neurons fire (first load only)"

pytestmark = pytest.mark.usefixtures("compiled")
Make = Callable[..., Path]


def no_progress(*_: object) -> None:
    pass


@pytest.fixture
def model(tiny_llama: Make, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A tiny ReLU model of 80 neurons a layer, two groups and a half, that no other test has packed."""
    folder = shutil.copytree(tiny_llama(hidden_act="relu", intermediate_size=80), tmp_path / "model")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"made_for": request.node.nodeid}))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "first.txt", tmp_path / "second.txt", tmp_path / "short.txt"]
    for file, text in zip(files, (SAMPLE_TEXT[:900], SAMPLE_TEXT[1000:2000], "a"), strict=True):
        file.write_text(text)
    return files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic model of four topics, with predictors."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf"], check=True, capture_output=True)
    return folder / "hf"


def packed_of(model: Path, dtype: str = "auto") -> Path:
    return ensure_packed(model, dtype, print, lambda done, total: None)


def options_of(texts: list[Path]) -> list[str | Path]:
    return [part for text in texts for part in ("--text", text)]


def profile(model: Path, texts: list[Path], *options: str) -> dict[str, Any]:
    outcome = run("profile", prepack(model), *options_of(texts), "--json", *options, timeout=120)
    assert outcome.code == 0, outcome.err
    facts: dict[str, Any] = json.loads(outcome.out)
    return facts


@torch.inference_mode()
def gates_of(model: Path, ids: list[int]) -> np.ndarray:
    """float32 [layers, len(ids), ffn]: the outputs of transformers' gate_proj, computed in pieces of a job's length."""
    llama, layers = llama_from_folder(model), []
    for layer in llama.model.layers:
        layers.append([])
        layer.mlp.gate_proj.register_forward_hook(lambda _m, _i, out, to=layers[-1]: to.append(out[0].numpy()))
    for at in range(0, len(ids), JOB):
        llama(torch.tensor([ids[at : at + JOB]]), use_cache=False)
    return np.stack([np.concatenate(pieces) for pieces in layers])


def order_of(model: PackedModel, folder: Path, layer: int) -> np.ndarray:
    """Which of the folder's neurons is at each place, found by the gate rows themselves."""
    gate = llama_from_folder(folder).model.layers[layer].mlp.gate_proj.weight.detach().numpy()
    places = {row.tobytes(): neuron for neuron, row in enumerate(gate)}
    return np.array([places[row.tobytes()] for row in rows_of(model, groups_of(model, layer), 0)[: len(gate)]])


def test_counts_are_those_of_transformers(model: Path, texts: list[Path]) -> None:
    """The counts are in the order of the file's neurons, text by text and segment by segment."""
    facts = profile(model, texts)
    with PackedModel(packed_of(model)) as packed:
        counted, tokenizer = Profile.of(packed), Tokenizer(packed)
        orders = [order_of(packed, model, layer) for layer in range(2)]
    assert counted is not None
    assert facts["reordered"]
    assert any((order != np.arange(80)).any() for order in orders)
    texts_ids = [tokenizer.encode(text.read_text()) for text in texts]
    assert len(texts_ids[0]) > JOB, "more than a job"
    assert facts["tokens"] == sum(map(len, texts_ids))
    least, most, lengths = [], [], []
    for ids in texts_ids:
        gates = gates_of(model, ids)
        for at in range(0, len(ids), SEGMENT):
            some = gates[:, at : at + SEGMENT]
            lengths.append(some.shape[1])
            # A gate within the rounding of zero may fall either way.
            least.append((some > 1e-4).sum(1))
            most.append((some > -1e-4).sum(1))
    assert counted.tokens == lengths
    for layer, order in enumerate(orders):
        counts = counted.counts[layer].astype(int)
        np.testing.assert_array_less(np.stack(least)[:, layer][:, order] - 1, counts[:, :80])
        np.testing.assert_array_less(counts[:, :80], np.stack(most)[:, layer][:, order] + 1)
        assert not counts[:, 80:].any()
    uncertain = np.sum(most) - np.sum(least)
    assert uncertain < 0.001 * np.sum(most)
    active = np.sum(least, axis=(0, 2)) / (80 * sum(lengths))
    assert facts["firing"]["mean"] == pytest.approx(active.mean(), rel=1e-3)


@pytest.mark.parametrize("selector", ["all", "exact", "lowrank", "lowbit"])
def test_the_order_changes_no_logits(made: Path, selector: str) -> None:
    overrides = {"dtype": "f32", "selector": selector, "bits": 4, "recall": 0.9999}
    path = packed_of(made, "f32")
    prompt = [300, 301, 302, 400, 333]
    ids = prompt + [int(token) for token in np.random.default_rng(0).integers(259, 512, 12)]
    logits, tokens, orders = [], [], []
    unordered = path.with_name("unordered.safetensors")
    if not unordered.exists():
        shutil.copy(path, unordered)
    for engine in (
        Engine(open_for_profiling(unordered, EngineConfig(**overrides), print, no_progress)),
        Engine.load(str(made), **overrides),
    ):
        with engine:
            logits.append(np.array(list(engine.forced_logits(ids, len(prompt)))))
            tokens.append(engine.decode_ids(prompt, 24))
            orders.append(engine.model.order)
    assert orders[0] == ""
    assert orders[1] != ""
    # lowbit misses neurons on purpose: a ten-thousandth of the mass.
    tolerance = 2e-2 if selector == "lowbit" else 1e-4
    assert np.abs(logits[0] - logits[1]).max() < tolerance * np.abs(logits[0]).max()
    assert tokens[0] == tokens[1]


def held(counts: np.ndarray, ids: list[list[int]]) -> float:
    """The share of a text's firing that is in a quarter of the groups: those that are hottest for it."""
    bounds = np.cumsum([0, *(-(-len(some) // SEGMENT) for some in ids)])
    shares = []
    for low, high in pairwise(bounds):
        fired = counts[:, low:high].sum(1, dtype=int)
        groups = np.sort(fired.reshape(len(fired), -1, 32).sum(2), axis=1)
        shares.append(groups[:, -groups.shape[1] // 4 :].sum() / groups.sum())
    return float(np.mean(shares))


def test_topics_come_into_groups_of_their_own(made: Path) -> None:
    """A text of one topic fires in fewer groups than before, and than with neurons in order of hotness alone."""
    texts = [
        [259 + 4 * int(word) + topic for word in np.random.default_rng(topic).integers(0, 63, 160)]
        for topic in range(4)
    ]
    path = packed_of(made, "f16")
    from warmfront.coordinator.profile.counting import count, empty_profile, jobs_of
    from warmfront.coordinator.profile.reorder import reorder

    with open_for_profiling(path, EngineConfig(dtype="f16", gpu="none"), print, no_progress) as session:
        counted = empty_profile(session.model, ["topics"])
        count(session.firing, counted, jobs_of(texts, JOB))
    before = counted.counts
    hottest = np.argsort(-before.sum(1, dtype=int), axis=1)
    assert reorder(path, counted, "", print, lambda done, total: None)
    with PackedModel(path) as model:
        after = Profile.of(model)
    assert after is not None
    by_hotness = np.take_along_axis(before, hottest[:, None], axis=2)
    assert held(after.counts, texts) > held(by_hotness, texts) + 0.02
    assert held(by_hotness, texts) > held(before, texts) + 0.1


def test_interrupted_and_resumed(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(SAMPLE_TEXT * (60_000 // len(SAMPLE_TEXT)))
    path = packed_of(prepack(model))
    command = [WARMFRONT, "profile", os.fspath(model), "--text", os.fspath(text)]
    with Terminal(command) as terminal:
        terminal.read_until(" tokens, ")
        terminal.press(CTRL_C)
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.text
    with PackedModel(path) as packed:
        assert packed.profile == {}, "nothing has changed yet"
    outcome = run(*command[1:], timeout=120)
    assert outcome.code == 0, outcome.err
    assert outcome.err.startswith("going on after ")
    assert outcome.err.count("\n") == 1
    resumed = path.read_bytes()
    assert list(path.parent.glob(f"{path.stem}*")) == [path]
    path.unlink()
    outcome = run(*command[1:], timeout=120)
    assert outcome.err == ""
    assert path.read_bytes() == resumed


def test_first_load(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiled once, on its own, and again for each weight type; the text comes out the same."""
    models = link_cache(tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "home"))
    command = ("generate", "-m", model, "-p", "The sea", "-n", "8", "--json")
    first, second, other = run(*command), run(*command), run(*command, "--dtype", "f16")
    assert [outcome.err.splitlines() for outcome in (first, second, other)] == [[FIRST_LOAD], [], [FIRST_LOAD]]
    assert json.loads(first.out)["token_ids"] == json.loads(second.out)["token_ids"]
    for path in models.glob("*.safetensors"):
        with PackedModel(path) as packed:
            assert packed.profile["texts"] == ["sample"]
            assert sum(packed.profile["tokens"]) > 150
    assert len(list(models.iterdir())) == 2


def test_two_first_loads_at_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One counts, the other waits for it and takes its order."""
    models = link_cache(tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "home"))
    prepack(model)
    command = [WARMFRONT, "generate", "-m", model, "-p", "The sea", "-n", "8"]
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
            for _ in range(2)
        ]
        ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
    said = b"".join(err for _, err in ends).decode()
    assert said.count(FIRST_LOAD) == 1, said
    assert len(list(models.iterdir())) == 1


def test_without_a_tokenizer_it_is_the_models_own_text(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    said: list[str] = []
    with Engine.load(str(model), say=said.append) as engine:
        assert FIRST_LOAD in said
        assert sum(engine.model.profile["tokens"]) > 100


def test_dense_models_are_left_alone(tiny_llama: Make, texts: list[Path]) -> None:
    said: list[str] = []
    path = prepack(tiny_llama())
    with Engine.load(str(path), say=said.append) as engine:
        assert (said, engine.model.profile, engine.model.order) == ([], {}, "")
    assert_refused(run("profile", path, *options_of(texts)), 2, "not ReLU-like", "silu", "nothing to profile")


def test_a_single_token(model: Path, texts: list[Path]) -> None:
    assert profile(model, texts, "--tokens", "1")["tokens"] == 1


def test_what_it_prints(model: Path, texts: list[Path]) -> None:
    outcome = run_anew("profile", prepack(model), *options_of(texts[:2]), "--tokens", "300")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    for words in ("300 tokens of first.txt", "80 %", "ordered anew", os.fspath(packed_of(model))):
        assert words in outcome.out
    again = run("profile", model, *options_of(texts[:2]), "--tokens", "300")
    assert "in the same order" in again.out
    assert again.out.splitlines()[:3] == outcome.out.splitlines()[:3]


@pytest.fixture
def bad(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    def make(what: str) -> Path:
        file = tmp_path / what
        if what == "latin":
            file.write_bytes("Füße".encode("latin-1"))
        elif what == "empty":
            file.write_text(" \n")
        elif what == "folder":
            file.mkdir()
        return file

    return make


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", ["missing", "No such file"]),
        ("folder", ["folder", "directory"]),
        ("latin", ["latin", "not UTF-8", "byte 1"]),
        ("empty", ["empty", "give a file with some text"]),
    ],
)
def test_texts_that_are_none(bad: Callable[[str], Path], texts: list[Path], what: str, words: list[str]) -> None:
    """Found before anything is packed: the model need not exist."""
    assert_refused(run("profile", "/nonexistent", *options_of([texts[0], bad(what)])), 2, *words)


def test_refusals(model: Path, texts: list[Path]) -> None:
    assert_refused(run("profile", model), 2, "--text")
    assert_refused(run("profile", *options_of(texts)), 2, "MODEL")
    assert_refused(run("profile", model, *options_of(texts), "--tokens", "0"), 2, "--tokens")
    (model / "tokenizer.json").unlink()
    assert_refused(run("profile", prepack(model), *options_of(texts)), 2, "tokenizer.json")
