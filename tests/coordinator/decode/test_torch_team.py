"""Attention by torch on the CPU gives what the compiled team gives, with workers that are a simple function of x.

Run: pytest tests/coordinator/decode/test_torch_team.py
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from warmfront.coordinator.decode.network import LOST, STEPS
from warmfront.coordinator.decode.thread_team import ThreadTeam
from warmfront.coordinator.decode.torch_network import TorchNetwork, device_bytes
from warmfront.coordinator.decode.torch_team import TorchTeam
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.errors import ModelError, ResourceError, WorkerError
from warmfront.shared.kernels.gemm import in_pairs
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores
from warmfront.shared.machine.memory import address, zeros
from warmfront.shared.model.formats import unpack
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.board import LEAVE, Board, BoardSizes
from warmfront.shared.wire.handoff import ABORTED, DONE, LATE, announce, await_sequence

CONTEXT, MOST = 128, 80
RNG = np.random.default_rng(3)
# A prompt in two parts, the second behind the first, then tokens one by one.
JOBS = [RNG.integers(3, 290, count).tolist() for count in (70, 17, 1, 1, 1)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MakeLlama = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def packed(folder: Path, dtype: str = "f32") -> PackedModel:
    return PackedModel(ensure_packed(folder, dtype, lambda line: None, lambda done, total: None))


def with_predictors(folder: Path, made: Path, **metadata: str) -> Path:
    """A copy of a model with random predictors of two sizes."""
    shutil.copytree(folder, made)
    tensors = {}
    for layer, rank in enumerate((24, 40)):
        tensors[f"layers.{layer}.fc1.weight"] = RNG.normal(size=(rank, 64)).astype(np.float32)
        tensors[f"layers.{layer}.fc2.weight"] = RNG.normal(size=(200, rank)).astype(np.float32)
    save_file(tensors, made / "predictor.safetensors", metadata)
    return made


class Workers:
    """Two workers whose parts are tanh(x) / 2 and x / -5, in threads; what was asked of them is kept."""

    def __init__(self, model: PackedModel) -> None:
        spec = model.spec
        sizes = BoardSizes(2, spec.layers, model.layout.groups, spec.hidden, MOST)
        self.board = Board.create(zeros(sizes.total, np.uint8), sizes)
        self.gone = np.zeros(2, np.int64)
        self.asked: list[tuple[list[int], np.ndarray, np.ndarray]] = []
        self.silent = False
        self._threads = [threading.Thread(target=self._live, args=(worker,), daemon=True) for worker in range(2)]
        for thread in self._threads:
            thread.start()

    def _live(self, worker: int) -> None:
        board, sequence = self.board, 0
        while True:
            sequence += 1
            if await_sequence(address(board.job), sequence, address(board.leave[worker]), 0, 0) != DONE:
                return
            layer, tokens, lanes, _ = order = board.order[:4].tolist()
            if layer == LEAVE:
                return
            count = -(-tokens // lanes) * lanes * board.sizes.hidden
            x = board.x[:count]
            if worker == 0:
                rows = x.reshape(-1, board.sizes.hidden, lanes).swapaxes(1, 2).reshape(-1, board.sizes.hidden)
                self.asked.append((order, rows[:tokens].copy(), board.mask[layer].copy()))
            if worker == 1 and self.silent:
                self.gone[1] = 1
                return
            board.y[worker][:count] = np.tanh(x) / 2 if worker == 0 else x / -5
            board.record[worker][:2] = time.monotonic_ns()
            announce(address(board.done[worker]), sequence)

    def end(self) -> None:
        for leave in self.board.leave:
            leave[0] = 1
        for thread in self._threads:
            thread.join()


def opened(model: PackedModel, workers: Workers, kind: str, selector: str = "all", ahead: bool = False) -> Any:
    """A team, loaded: "compiled", of one thread, or on a device of torch's."""
    team: Any
    if kind == "compiled":
        team = ThreadTeam(
            model,
            workers.board,
            workers.gone,
            CorePlan((WorkerCores(0, (0,)),)),
            True,
            CONTEXT,
            selector,
            None,
            ahead,
            True,
        )
    else:
        team = TorchTeam(model, workers.board, workers.gone, kind, [0], CONTEXT, selector, ahead)
    team.start()
    while not team.ready():
        time.sleep(0.01)
    assert team.progress()[0] > 0
    return team


def asked_and_said(model: PackedModel, kind: str, selector: str = "all", ahead: bool = False) -> tuple[Any, np.ndarray]:
    """What the workers were asked in JOBS, and the logits after each."""
    workers, position, logits = Workers(model), 0, []
    team = opened(model, workers, kind, selector, ahead)
    for tokens in JOBS:
        assert team.run(tokens, position, True, measure=len(tokens) == 1) == DONE
        position += len(tokens)
        logits.append(team.logits.copy())
    team.stop()
    workers.end()
    return workers.asked, np.array(logits)


def assert_equal(
    model: PackedModel, tolerance: float, selector: str = "all", ahead: bool = False, device: str = "cpu"
) -> list[np.ndarray]:
    """Returns the masks of the single tokens."""
    theirs, expected = asked_and_said(model, "compiled", selector, ahead)
    ours, got = asked_and_said(model, device, selector, ahead)
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
    assert len(ours) == len(theirs) == len(JOBS) * model.spec.layers
    masks = []
    for (order, x, mask), (their_order, their_x, their_mask) in zip(ours, theirs, strict=True):
        assert order == their_order
        assert np.abs(x - their_x).max() < tolerance * np.abs(their_x).max()
        if order[1] == 1:
            assert (mask == their_mask).all()
            masks.append(mask)
    if tolerance < 1e-3:
        assert (got.argmax(1) == expected.argmax(1)).all()
    return masks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"head_dim": 8, "rope_parameters": LLAMA3},
        {"attention_bias": True, "tie_word_embeddings": True},
    ],
    ids=["plain", "one head each", "one key head", "llama3", "biases and tied head"],
)
def test_what_the_compiled_team_says(tiny_llama: MakeLlama, options: dict[str, Any]) -> None:
    with packed(tiny_llama(**options)) as model:
        assert_equal(model, 2e-5)


def logits_in_float64(model: PackedModel) -> np.ndarray:
    """The logits after each of JOBS, of the packed weights as they are: float64 [jobs, vocab]."""
    spec = model.spec
    ids = [token for tokens in JOBS for token in tokens]
    attention, (rotary,) = spec.architecture.attention, spec.architecture.positions.rotary
    half, tokens = attention.head_dim // 2, len(ids)
    angles = np.outer(np.arange(tokens), rotary.frequencies)[:, None]

    def weights(name: str) -> np.ndarray:
        entry = model.entries[name]
        if entry.kind is None:
            return model.floats(name).astype(np.float64)
        cols = attention.heads * attention.head_dim if name.endswith(".o") else spec.hidden
        return unpack(model.bytes_of(name).reshape(entry.shape), entry.kind, cols).astype(np.float64)

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(1, keepdims=True) + spec.architecture.norm.epsilon) * weights(name)

    def rotated(rows: np.ndarray) -> np.ndarray:
        even, odd = rows[..., 0::2], rows[..., 1::2]
        turned = even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)
        return np.stack(turned, axis=-1).reshape(*rows.shape[:2], 2 * half)

    x = weights("embed")[ids]
    for layer in range(spec.layers):
        at = f"layers.{layer}."
        h = normed(x, at + "attn_norm")
        q, k, v = (
            (h @ weights(at + part).T + weights(f"{at}{part}.bias")).reshape(tokens, -1, attention.head_dim)
            for part in "qkv"
        )
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(part, attention.heads // attention.kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(attention.head_dim)
        scores[:, ~np.tri(tokens, dtype=bool)] = -np.inf
        chances = np.exp(scores - scores.max(2, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", chances / chances.sum(2, keepdims=True), v).reshape(tokens, -1)
        x = x + mixed @ weights(at + "o").T + weights(at + "o.bias")
        h = normed(x, at + "ffn_norm")
        x = x + np.tanh(h) / 2 - h / 5
    ends = np.cumsum([len(job) for job in JOBS]) - 1
    return normed(x[ends], "norm") @ weights("head").T


@pytest.mark.parametrize("kind", ["compiled", "cpu"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8", "q4"])
def test_narrower_weights(tiny_llama: MakeLlama, dtype: str, kind: str) -> None:
    """What is multiplied is rounded: by torch to the type of the weights (8 and 4 bits are widened to float16), by the
    compiled team in prefill to bfloat16 where the CPU multiplies that, and by the cache of both to float16. The errors
    of some ten roundings on the way add up, each of half a unit in the last place."""
    with packed(tiny_llama(attention_bias=True), dtype) as model:
        rounds_to_bfloat = dtype == "bf16" if kind == "cpu" else in_pairs(int(model.entries["embed"].kind or 0))
        half_unit = 2.0**-9 if rounds_to_bfloat else 2.0**-11
        exact, (_, got) = logits_in_float64(model), asked_and_said(model, kind)
        assert np.abs(got - exact).max() < 10 * half_unit * np.abs(exact).max()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("metadata", [{}, {"input": "normed", "activation": "none", "threshold": "0.5"}])
def test_predictors(tiny_llama: MakeLlama, tmp_path: Path, metadata: dict[str, str], ahead: bool) -> None:
    folder = with_predictors(tiny_llama(hidden_act="relu", intermediate_size=200), tmp_path / "made", **metadata)
    with packed(folder) as model:
        masks = np.array(assert_equal(model, 2e-5, "lowrank", ahead))
    share = np.bitwise_count(masks).sum() / (len(masks) * 200)
    assert 0.1 < share < 0.9
    assert not (masks[:, -1] >> 8).any(), "what is padding was predicted"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("bf16", 3e-2)])
def test_a_real_card(tiny_llama: MakeLlama, tmp_path: Path, dtype: str, tolerance: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    with packed(tiny_llama(attention_bias=True), dtype) as model:
        assert_equal(model, tolerance, device="cuda:0")
    folder = with_predictors(tiny_llama(hidden_act="relu", intermediate_size=200), tmp_path / "made")
    with packed(folder) as model:
        assert_equal(model, 1e-4, "lowrank", device="cuda:0")


def test_times_and_inputs_of_a_job(tiny_llama: MakeLlama) -> None:
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "cpu")
        before = time.monotonic_ns()
        for tokens in ([5, 6, 7], [8]):
            workers.asked.clear()
            assert team.run(tokens, 0, False, capture=True) == DONE
            inputs = team.captured(len(tokens))
            assert inputs.shape == (2, len(tokens), 64)
            for (_, x, _), given in zip(workers.asked, inputs, strict=True):
                np.testing.assert_array_equal(x, given)
        steps, spans = team.times()
        assert steps.shape == (2, len(STEPS))
        assert before < steps[0, 0]
        assert (np.diff(steps.ravel()) >= 0).all()
        assert ((spans > steps[:, :1, None]) & (spans < steps[:, -1:, None])).all()
        assert not team.logits.any(), "logits that nobody wanted"
        team.stop()
        workers.end()


def test_a_lost_worker(tiny_llama: MakeLlama) -> None:
    """The job ends, is run again without it, and says what the compiled team says."""
    said = {}
    with packed(tiny_llama()) as model:
        for kind in ("compiled", "cpu"):
            workers = Workers(model)
            workers.silent = True
            team = opened(model, workers, kind)
            assert team.run(JOBS[0], 0, True) == LOST
            team.present[1] = 0
            assert team.run(JOBS[0], 0, True) == DONE
            assert team.run(JOBS[2], len(JOBS[0]), True) == DONE
            said[kind] = team.logits.copy()
            team.stop()
            workers.end()
    np.testing.assert_allclose(said["cpu"], said["compiled"], atol=2e-5 * np.abs(said["compiled"]).max())


def test_an_abort(tiny_llama: MakeLlama) -> None:
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "cpu")
        workers.end()
        workers.board.abort[0] = 1
        workers.gone[:] = 1
        assert team.run([5], 0, True) == ABORTED
        team.stop()


def test_a_worker_that_does_not_answer(tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmfront.coordinator.decode.torch_team._WORKER_PATIENCE_NS", 10_000_000)
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "cpu")
        workers.end()
        with pytest.raises(WorkerError, match="a worker did not answer for two minutes"):
            team.run([5], 0, True)
        team.stop()


def test_after_a_worker_was_late_nobody_waits_again(tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled team's threads have ended by then: a job would never be done."""
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "compiled")
        assert team.run([5], 0, True) == DONE

        def late(*_arguments: int) -> int:
            team._state.status[:] = LATE
            return DONE

        monkeypatch.setattr("warmfront.coordinator.decode.thread_team.await_sequence", late)
        with pytest.raises(WorkerError, match="a worker did not answer for two minutes"):
            team.run([6], 1, True)
        monkeypatch.undo()
        with pytest.raises(WorkerError, match="a worker did not answer for two minutes"):
            team.run([6], 1, True)
        workers.end()
        team.stop()


def test_stopped_before_it_has_loaded(tiny_llama: MakeLlama) -> None:
    """No job was announced, nobody is told to leave."""
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        idle = TorchTeam(model, workers.board, workers.gone, "cpu", [0], CONTEXT, "all", False)
        idle.stop()
        assert workers.board.job[0] == 0
        workers.end()


def errors_of_loading(model: PackedModel, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Any:
    def fail(*_arguments: object) -> None:
        raise error

    workers = Workers(model)
    monkeypatch.setattr(model, "read_into", fail)
    with pytest.raises((ModelError, ResourceError)) as caught:
        opened(model, workers, "cpu")
    workers.end()
    return caught.value


def test_errors_of_loading(tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    with packed(tiny_llama()) as model:
        assert str(errors_of_loading(model, ModelError("truncated"), monkeypatch)) == "truncated"
        error = errors_of_loading(model, RuntimeError("CUDA error: no luck\nCompile with"), monkeypatch)
        assert str(error) == "attention on cpu failed: CUDA error: no luck"
        error = errors_of_loading(model, torch.OutOfMemoryError("CUDA out of memory. Tried to"), monkeypatch)
        assert str(error) == (
            "attention on cpu has not enough memory: pass a smaller --ctx or --vram-budget, or --attention cpu"
        )


def tensors_of(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_on_the_device(tiny_llama: MakeLlama, tied: bool) -> None:
    """Said before anything is loaded; the tables of RoPE and the like apart."""
    with packed(tiny_llama(attention_bias=True, tie_word_embeddings=tied), "q8") as model:
        network = TorchNetwork(model, "cpu", CONTEXT, "all")
        network.load(lambda: True)
        have = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(vars(network).values())}
        small = network._cos.nbytes + network._sin.nbytes + network._bits.nbytes
        assert sum(have.values()) - small == device_bytes(model, CONTEXT, "all")
