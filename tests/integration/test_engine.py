"""The Python API, used as nobody should: it answers right or refuses.  pytest tests/integration/test_engine.py"""

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.integration.reference import all_logits, model_from_packed
from tests.leak_check import assert_nothing_left, snapshot
from warmfront.coordinator.decode import thread_team
from warmfront.coordinator.engine import memory
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.errors import ResourceError, UsageError, WorkerError
from warmfront.shared.kernels.gemm import in_pairs
from warmfront.shared.kernels.tiles import in_tiles

IDS = [3 + (7 * i + i // 13) % 290 for i in range(48)]
X, Y = [5, 17, 200, 42], [101, 7, 250]
CONTEXT = 64


@pytest.fixture(scope="module")
def engine(tiny_llama: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.load(str(tiny_llama()), context=CONTEXT, dtype="f32", parallel=3) as engine:
        yield engine


def tokens_of(engine: Engine, ids: list[int], count: int = 12) -> list[int]:
    return [token.id for token in engine.generate(ids, max_new_tokens=count)]


@pytest.mark.parametrize("dtype", ["q8", "q4"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"head_dim": 16},
        {"head_dim": 64},
        {"head_dim": 8},
        {"hidden_size": 256, "head_dim": 16, "scale": 0.08},
        {"hidden_size": 640, "num_key_value_heads": 1, "head_dim": 256, "scale": 0.04},
    ],
    ids=lambda sizes: " ".join(f"{name}={size}" for name, size in sizes.items()),
)
def test_rounded_weights(tiny_llama: Callable[..., Path], sizes: dict[str, Any], dtype: str) -> None:
    """Logits are those that transformers computes of the rounded weights, up to what is rounded on the way.

    Decoding rounds keys and values to float16, prefill its inputs to 8 bits where the CPU multiplies bytes, else to
    bfloat16 where it is fast at that.
    """
    folder = tiny_llama(**sizes)
    with Engine.load(str(folder), dtype=dtype, context=CONTEXT) as engine:
        model = model_from_packed(folder, engine.model)
        exact = all_logits(model, IDS)
        rows = int(engine.model.entries["embed"].kind or 0)
        in_prefill = 2.0**-8 if in_tiles(rows) else 2.0**-9 if in_pairs(rows) else 2.0**-11
        for prefill, half_unit in ((1, 2.0**-11), (40, in_prefill)):
            got = np.stack(list(engine.forced_logits(IDS, prefill)))
            error = np.abs(got - exact[prefill - 1 :]).max(1) / np.abs(exact[prefill - 1 :]).max(1)
            assert np.median(error) < 8 * half_unit, f"{np.median(error):.1e} after a prefill of {prefill}"
            # Where a random model's attention wavers between two tokens, a rounding counts for more.
            assert error.max() < 64 * half_unit, f"{error.max():.1e} after a prefill of {prefill}"


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.decode_ids(IDS, CONTEXT - len(IDS) + 1),
        lambda engine: engine.decode_ids(IDS, 10**6),
        lambda engine: [engine.step(3) for _ in range(CONTEXT + 1)],
        lambda engine: engine.step(-1),
        lambda engine: engine.step(engine.model.spec.vocab),
        lambda engine: engine.step(10**12),
        lambda engine: engine.step(1.5),
        lambda engine: engine.decode_ids([1, -2], 1),
        lambda engine: engine.decode_ids([], 1),
        lambda engine: engine.prompt_ids([engine.model.spec.vocab]),
        lambda engine: list(engine.forced_logits(IDS * 2, 1)),
        lambda engine: list(engine.forced_logits(IDS, 0)),
        lambda engine: list(engine.forced_logits(IDS, -1)),
        lambda engine: list(engine.forced_logits(IDS, len(IDS) + 1)),
        lambda engine: list(engine.generate([1, 2.5])),
        lambda engine: list(engine.generate(None)),
        lambda engine: list(engine.generate(5)),
        lambda engine: list(engine.generate(b"abc")),
        lambda engine: list(engine.generate(X, stop=None)),
        lambda engine: list(engine.generate(X, stop=[1])),
        lambda engine: list(engine.generate(X, stop=b"a")),
        lambda engine: list(engine.generate(X, sampling={"temperature": 1})),
        lambda engine: engine.decode_ids(X, 1.5),
        lambda engine: engine.decode_ids(X, -1),
        lambda engine: list(engine.forced_logits(X, 1.0)),
        lambda engine: engine.session.firing(IDS),
        lambda engine: engine.session.feed_forward_inputs(IDS),
    ],
)
def test_what_lies_outside_is_refused(engine: Engine, use: Callable[[Engine], object]) -> None:
    expected = tokens_of(engine, X)
    with pytest.raises(UsageError):
        use(engine)
    assert tokens_of(engine, X) == expected


def test_the_whole_context_can_be_used(engine: Engine) -> None:
    engine.reset()
    for token in range(CONTEXT):
        assert np.isfinite(engine.step(token)).all()
    assert len(engine.decode_ids(IDS, CONTEXT - len(IDS))) == CONTEXT - len(IDS)


@pytest.mark.parametrize(
    "other",
    [
        lambda engine: next(engine.generate(Y)),
        lambda engine: engine.step(9),
        lambda engine: engine.reset(),
        lambda engine: engine.decode_ids(Y, 2),
        lambda engine: next(engine.forced_logits(Y, 1)),
    ],
    ids=["generate", "step", "reset", "decode_ids", "forced_logits"],
)
def test_an_answer_goes_on_beside_others(engine: Engine, other: Callable[[Engine], object]) -> None:
    alone = tokens_of(engine, X)
    answer = engine.generate(X, max_new_tokens=12)
    assert [next(answer).id for _ in range(3)] == alone[:3]
    beside = other(engine)
    assert [token.id for token in answer] == alone[3:]
    del beside
    assert tokens_of(engine, X) == alone


def test_what_the_cache_cannot_hold_beside_others_is_refused(tiny_llama: Callable[..., Path]) -> None:
    """Two answers that each may take all of the context: the second is refused in a line, the first goes on."""
    with Engine.load(str(tiny_llama()), context=64) as engine:
        first, second = (engine.generate(ids * 11, max_new_tokens=20, ignore_eos=True) for ids in (X, Y))
        begun = [next(first).id]
        with pytest.raises(UsageError, match="the KV cache is full of other texts"):
            list(second)
        rest = [token.id for token in first]
        assert tokens_of(engine, X * 11, 20) == begun + rest
        assert len(tokens_of(engine, Y * 11, 20)) == 20


def test_no_token_comes_of_another_text(engine: Engine) -> None:
    """However two threads meet."""
    alone = {ids[0]: tokens_of(engine, ids, 30) for ids in (X, Y)}
    wrong: list[list[int]] = []
    over = time.monotonic() + 3

    def use(ids: list[int]) -> None:
        while time.monotonic() < over:
            tokens = [token.id for token in engine.generate(ids, max_new_tokens=30)]
            if tokens != alone[ids[0]]:
                wrong.append(tokens)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(ids,)) for ids in (X, Y)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


class _Busy(threading.Thread):
    """Uses an engine until it is refused."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True)
        self._engine, self.begun, self.end = engine, threading.Event(), ""

    def run(self) -> None:
        try:
            while True:
                self._engine.decode_ids(X, 20)
                self.begun.set()
        except UsageError as error:
            self.end = str(error)


@pytest.mark.parametrize("after", [0.0, 0.003, 0.01, 0.05])
def test_closing_waits_for_the_job_of_another_thread(tiny_llama: Callable[..., Path], after: float) -> None:
    engine = Engine.load(str(tiny_llama()), context=CONTEXT)
    thread = _Busy(engine)
    thread.start()
    assert thread.begun.wait(10)
    time.sleep(after)
    engine.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "closed" in thread.end


def test_threads_get_their_own_text(engine: Engine) -> None:
    prompts = [X, Y, [9, 9]]
    alone = [tokens_of(engine, ids, 30) for ids in prompts]
    seen: list[list[int]] = []

    def use(ids: list[int]) -> None:
        seen.append(tokens_of(engine, ids, 30))

    for _ in range(10):
        threads = [threading.Thread(target=use, args=(ids,), daemon=True) for ids in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert sorted(seen) == sorted(alone * 10)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_an_overflow_stays_in_its_text(tiny_llama: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    """Token 7 alone drives a value beyond what the cache holds; a text beside it is what it is in a fresh engine."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = dict(load_file(folder / "model.safetensors"))
    embed, values = (tensors[f"model.{name}.weight"].copy() for name in ("embed_tokens", "layers.0.self_attn.v_proj"))
    values[0], values[0, 0] = 0, 3e4 if dtype == "f16" else 3e38
    embed[:, 0], embed[7], embed[7, 0] = 0, 0, 5
    tensors |= {"model.embed_tokens.weight": embed, "model.layers.0.self_attn.v_proj.weight": values}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    harmless = [token if token != 7 else 8 for token in IDS]
    poison = [*harmless[:20], *[7] * 20]
    with Engine.load(str(folder), dtype=dtype, context=CONTEXT) as engine:
        fresh = np.stack(list(engine.forced_logits(harmless, 12)))
        assert np.isfinite(fresh).all()
        for prefill in (30, 5):
            assert not np.isfinite(list(engine.forced_logits(poison, prefill))[-1]).any()
            np.testing.assert_array_equal(np.stack(list(engine.forced_logits(harmless, 12))), fresh)
        # A text that shares its beginning: what was cached beside the overflow is computed anew.
        engine.decode_ids(harmless[:21], 1)
        clean = engine.session.runtime.logits[0].copy()
        list(engine.forced_logits(poison, 30))
        engine.decode_ids(harmless[:21], 1)
        np.testing.assert_allclose(engine.session.runtime.logits[0], clean, rtol=0, atol=0.03 * np.abs(clean).max())


class _Dying:
    """Stands for the loop of the team's threads: ends with an error after its time."""

    def __init__(self, after: threading.Event) -> None:
        self._after, self._real = after, thread_team.serve_team

    def __call__(self, member: int, *arguments: object) -> None:
        if member == 0:
            self._after.wait()
            raise MemoryError("no more room")
        self._real(member, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_thread_that_dies_ends_the_run(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(thread_team, "serve_team", _Dying(over))
    with Engine.load(str(tiny_llama()), context=CONTEXT, threads=2, force=True) as engine:
        threading.Timer(0.5, over.set).start()
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(WorkerError, match="a thread of the coordinator failed: MemoryError: no more room"):
                tokens_of(engine, X)
        engine.close()
        assert time.monotonic() - start < 3


def test_a_forked_child_is_refused(engine: Engine) -> None:
    expected = tokens_of(engine, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is the point here
        pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        try:
            tokens_of(engine, X)
        except UsageError as error:
            os._exit(0 if "belongs to process" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert tokens_of(engine, X) == expected


def test_what_does_not_fit_beside_the_weights_is_refused(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of two heads of 16 weights, padded to 32: 102 MB of float32 keys and values, 38 MB of scores."""
    monkeypatch.setattr(memory, "read_topology", lambda: SimpleNamespace(available_bytes=40_000_000))
    folder = tiny_llama(max_position_embeddings=100_000)
    with pytest.raises(ResourceError, match=r"GB \(0.00 for weights, 0.10 for a context of 100000 tokens\), 0.04 GB"):
        Engine.load(str(folder), context=100_000)
    with pytest.raises(ResourceError, match="for the emulated GPU"):
        Engine.load(str(folder), context=100_000, gpu="host")
    Engine.load(str(folder), context=512).close()


def test_a_closed_engine_refuses(tiny_llama: Callable[..., Path]) -> None:
    engine = Engine.load(str(tiny_llama()), context=CONTEXT)
    tokens_of(engine, X)
    engine.close()
    uses: list[Callable[[], object]] = [
        *(getattr(engine.statistics, name) for name in ("times", "workers", "reports", "selection", "device_memory")),
        engine.reset,
        lambda: engine.ownership,
        lambda: engine.step(1),
        lambda: engine.decode_ids(X, 1),
        lambda: next(engine.forced_logits(X, 1)),
        lambda: engine.session.firing(X),
        lambda: engine.session.feed_forward_inputs(X),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="closed"):
            use()


def test_an_engine_that_is_dropped_is_closed(tiny_llama: Callable[..., Path]) -> None:
    before = snapshot()
    engine = Engine.load(str(tiny_llama()), context=CONTEXT)
    answer = engine.generate(X)
    next(answer)
    held = [answer, engine]
    del answer, engine
    with pytest.warns(ResourceWarning, match="an engine was not closed"):
        held.clear()
    assert_nothing_left(before)


@pytest.mark.parametrize(
    "override",
    [{"context": True}, {"context": "64"}, {"threads": "2"}, {"threads": 1.5}, {"dtype": None}, {"pin": 1}],
    ids=str,
)
def test_values_of_another_type_are_refused(tiny_llama: Callable[..., Path], override: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(override))}=.*: it must be of type"):
        Engine.load(str(tiny_llama()), **override)


def test_the_example_of_the_readme(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert len(said.split()) > 10
    assert "WorkerStats(name='cpu0'" in said
