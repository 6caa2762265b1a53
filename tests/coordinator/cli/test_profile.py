"""`warmfront profile` with a made-up engine, interrupted and resumed.  pytest tests/coordinator/cli/test_profile.py"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from warmfront.coordinator.cli import profile
from warmfront.coordinator.engine import load as loading
from warmfront.coordinator.packing import arrays
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.profile import counting
from warmfront.coordinator.profile.counts import Profile
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import ModelError, ResourceError
from warmfront.shared.model.store import PackedModel

Make = Callable[..., Path]
LAYERS, NEURONS = 2, 96
RATES = np.random.default_rng(0).random((LAYERS, 1, NEURONS))


class Fake:
    """An engine whose firing depends on the tokens alone; interrupted after `max_jobs` jobs."""

    plan = SimpleNamespace(context=512)

    def __init__(self, max_jobs: int) -> None:
        self.left, self.seen = max_jobs, 0

    def firing(self, ids: Sequence[int]) -> np.ndarray:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += len(ids)
        return np.random.default_rng(list(ids)).random((LAYERS, len(ids), NEURONS)) < RATES

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None:
        pass


Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed models in a cache for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "warmfront" / "models"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files of a few thousand tokens each."""
    rng = np.random.default_rng(1)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(" ".join("abcdefgh"[i : i + 3] for i in rng.integers(0, 8, 900)))
    return files


@pytest.fixture
def run(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Run:
    """Profile a tiny model, interrupted after `max_jobs` jobs; `fakes` are the engines that were made."""
    model = str(tiny_llama(hidden_act="relu"))

    def run_profile(texts: list[Path], max_jobs: int = -1, *, dtype: str = "auto", **options: Any) -> dict[str, Any]:
        fakes: list[Fake] = []

        def make(*_: Any, **__: Any) -> Fake:
            fakes.append(Fake(max_jobs))
            return fakes[-1]

        monkeypatch.setattr(profile, "open_for_profiling", make)
        show = lambda what, done, total: None  # noqa: E731
        wishes = options.get("tokens"), options.get("order")
        facts = profile.profile(model, texts, EngineConfig(dtype=dtype), *wishes, said.append, show, show)
        return facts | {"seen": sum(fake.seen for fake in fakes)}

    return run_profile


def kept(models: Path) -> list[Path]:
    return list(models.glob("*-counted.npz"))


def stored(path: str) -> tuple[np.ndarray, list[int], str]:
    with PackedModel(Path(path)) as model:
        profile = Profile.of(model)
        assert profile is not None
        return profile.counts, profile.tokens, model.order


def test_resumed_is_as_uninterrupted(run: Run, texts: list[Path], models: Path, said: list[str]) -> None:
    whole = run(texts, dtype="f32")
    for max_jobs in (3, 0, 2):
        with pytest.raises(KeyboardInterrupt):
            run(texts, max_jobs)
        assert len(kept(models)) == 1
    facts = run(texts)
    assert kept(models) == []
    assert facts["seen"] == whole["seen"] - 5 * 288
    assert said == [
        f"going on after {jobs * 288:,} of {whole['tokens']:,} tokens, which an earlier run has counted"
        for jobs in (3, 3, 5)
    ]
    for left, right in zip(stored(facts["path"]), stored(whole["path"]), strict=True):
        np.testing.assert_array_equal(left, right)
    assert {**facts, "path": "", "seen": 0} == {**whole, "path": "", "seen": 0}
    assert whole["texts"] == ["a.txt", "b.txt"]


def test_a_published_order(run: Run, texts: list[Path], tmp_path: Path) -> None:
    """The neurons come in it, whatever order they had; their rates are those of the texts."""
    rng, folder = np.random.default_rng(3), tmp_path / "activation"
    folder.mkdir()
    wanted = [rng.permutation(NEURONS) for _ in range(LAYERS)]
    for layer, order in enumerate(wanted):
        counts = np.empty(NEURONS, np.int64)
        counts[order] = np.arange(9 * NEURONS, 8 * NEURONS, -1)
        torch.save(torch.from_numpy(counts), folder / f"activation_{layer}.pt")
    run(texts)
    facts = run(texts, order=folder)
    assert facts["reordered"]
    assert 0.4 < facts["firing"]["mean"] < 0.6
    with PackedModel(Path(facts["path"])) as model:
        np.testing.assert_array_equal(model.places(), wanted)
    assert not run(texts, order=folder)["reordered"]
    (folder / "activation_1.pt").unlink()
    with pytest.raises(ModelError, match=r"activation_1\.pt is missing: there must be counts for each of 2 layers$"):
        run(texts, order=folder)


def test_kept_after_the_last_job(run: Run, texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it writes the model: nothing is counted twice."""

    def stopped(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(profile, "reorder", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(texts)
    assert run(texts)["seen"] == 0


@pytest.mark.parametrize("change", ["text", "tokens", "order", "damage", "empty"])
def test_something_else_is_counted_anew(
    run: Run, texts: list[Path], models: Path, said: list[str], change: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(texts, 4)
    options = {}
    if change == "text":
        texts[1].write_text("another text " * 400)
    elif change == "tokens":
        options["tokens"] = 1500
    elif change == "order":
        held = kept(models)[0].rename(models / "held")
        run(texts)
        held.rename(models / (next(models.glob("*.safetensors")).stem + "-counted.npz"))
    else:
        kept(models)[0].write_bytes(b"PK\3\4 not whole" if change == "damage" else b"")
    facts = run(texts, **options)
    assert said == []
    assert facts["seen"] == facts["tokens"] > 288
    assert kept(models) == []


def test_kept_every_few_seconds(run: Run, texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even a kill loses little."""
    saved: list[int] = []
    real = profile.Partial.save

    def save(partial: profile.Partial) -> None:
        real(partial)
        saved.append(partial.done)

    monkeypatch.setattr(profile.Partial, "save", save)
    monkeypatch.setattr(profile, "_SAVE_EVERY_S", -1.0)
    tokens = run(texts)["tokens"]
    assert saved[: tokens // 288] == list(range(1, tokens // 288 + 1))


def test_so_many_tokens(run: Run, texts: list[Path]) -> None:
    assert run(texts, tokens=100)["tokens"] == 100
    facts = run(texts, tokens=1)
    assert (facts["tokens"], facts["texts"]) == (1, ["a.txt"])


def test_no_more_than_can_be_counted(
    run: Run, texts: list[Path], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(profile, "MAX_TOKENS", 400)
    for limit in (None, 401):
        assert run(texts, tokens=limit)["tokens"] == 400
    assert run(texts, tokens=399)["tokens"] == 399
    assert len(said) == 2
    assert all(line.endswith("the first 400 are counted") for line in said)


def no_progress(*_: object) -> None:
    pass


def first_load(model: PackedModel, said: list[str]) -> bool:
    """What a start does with a model that was never profiled."""
    on_sample = partial(loading._profile_sample, model, EngineConfig(), said.append, no_progress)
    return counting.ensure_profiled(model, on_sample, said.append, no_progress)


def test_a_first_load_that_comes_second(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """Another process has ordered the file since it was opened here."""
    path = ensure_packed(tiny_llama(hidden_act="relu"), "auto", print, lambda done, total: None)
    fake = Fake(-1)
    monkeypatch.setattr(loading, "open_for_profiling", lambda *_: fake)
    monkeypatch.setattr(loading, "sample_ids", lambda _session: list(range(300)))
    with PackedModel(path) as mine, PackedModel(path) as theirs:
        for model in (theirs, mine):
            assert first_load(model, said)
    assert said == ["profiling which neurons fire (first load only)"]
    assert fake.seen == 300


@pytest.mark.parametrize("lack", ["room", "right", "room while writing"])
def test_the_first_load_does_without(
    tiny_llama: Make, monkeypatch: pytest.MonkeyPatch, said: list[str], lack: str
) -> None:
    """Where no second copy of the model can be written."""
    path = ensure_packed(tiny_llama(hidden_act="relu"), "auto", print, lambda done, total: None)
    fake = Fake(-1)
    monkeypatch.setattr(loading, "open_for_profiling", lambda *_: fake)
    monkeypatch.setattr(loading, "sample_ids", lambda _session: list(range(300)))

    def full(*_: Any) -> bool:
        raise ResourceError("cannot write it: no room")

    if lack == "room":
        usage = counting.shutil.disk_usage(path)
        monkeypatch.setattr(counting.shutil, "disk_usage", lambda _path: usage._replace(free=path.stat().st_size - 1))
    elif lack == "right":
        monkeypatch.setattr(counting, "access", lambda _path, _mode: False)
    else:
        monkeypatch.setattr(counting, "reorder", full)
    with PackedModel(path) as model:
        assert not first_load(model, said)
    if lack == "room while writing":
        assert said == [
            "profiling which neurons fire (first load only)",
            "the neurons stay in the order they came in: cannot write it: no room",
        ]
    else:
        assert (said, fake.seen) == ([], 0)
    monkeypatch.undo()


@pytest.fixture
def loads(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Callable[[], Path]:
    """What a start does to the packed file; the engine is a fake whose neurons all fire on the sample."""
    monkeypatch.setattr(loading, "sample_ids", lambda _session: list(range(300)))

    def load() -> Path:
        path = ensure_packed(tiny_llama(hidden_act="relu"), "auto", said.append, no_progress)
        with monkeypatch.context() as patch, PackedModel(path) as model:
            patch.setattr(loading, "open_for_profiling", lambda *_: Fake(-1))
            first_load(model, said)
        return path

    return load


@pytest.mark.parametrize("sample", [True, False])
def test_a_profile_outlives_the_packed_file(
    run: Run, loads: Callable[[], Path], texts: list[Path], models: Path, said: list[str], sample: bool
) -> None:
    """It is used again when the model is packed again, to the bit; also one that was made in another order."""
    if sample:
        loads()
    path = Path(run(texts)["path"])
    before = path.read_bytes()
    said.clear()
    assert loads().read_bytes() == before
    assert said == []
    for file in models.iterdir():
        file.unlink()
    assert loads() == path
    assert said == ["ordering the neurons by your profile (a.txt, b.txt)"]
    assert path.read_bytes() == before


def test_only_the_profile_of_the_same_content_and_weight_type(
    run: Run, loads: Callable[[], Path], texts: list[Path], models: Path, said: list[str]
) -> None:
    run(texts, dtype="f16")
    said.clear()
    loads()
    assert said == ["profiling which neurons fire (first load only)"]


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "places", "counts", "facts"])
def test_a_damaged_profile_is_none(
    run: Run, loads: Callable[[], Path], texts: list[Path], models: Path, said: list[str], damage: str
) -> None:
    run(texts)
    (file,) = (models.parent / "profiles").iterdir()
    data = file.read_bytes()
    with np.load(file) as kept:
        parts = dict(kept)
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "zeros":
        file.write_bytes(data[:5000] + bytes(4096) + data[9096:])
    else:
        wrong = {"places": parts["places"] * 0, "counts": parts["counts"][:, :, 1:], "facts": np.array("{}")}
        np.savez(file, **(parts | {damage: wrong[damage]}))
    for packed in models.iterdir():
        packed.unlink()
    said.clear()
    loads()
    assert said == ["profiling which neurons fire (first load only)"]


def test_a_profile_that_cannot_be_kept(
    run: Run, texts: list[Path], monkeypatch: pytest.MonkeyPatch, said: list[str], models: Path
) -> None:
    """The profile is in the packed file all the same, and a line says so."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays, "write_whole", refuse)
    path = run(texts)["path"]
    assert len(said) == 1
    assert said[0].startswith("the profile is in the packed model alone, ")
    assert said[0].endswith("cannot be written: No space left on device")
    assert stored(path)[2] != ""
