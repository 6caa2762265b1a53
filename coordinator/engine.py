"""The Python API: load a model, generate tokens, read what it cost.

    with Engine.load("smollm2-135m") as engine:
        for token in engine.generate("The lighthouse keeper", max_new_tokens=32):
            print(token.text, end="")

An engine owns its worker processes, its team of threads and the board between them; `close` ends them all. It is
used from one thread at a time.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.choices import choose_attention, choose_context, choose_gpu, choose_selector
from warmfront.coordinator.default_model import DEFAULT_MODEL, resolve
from warmfront.coordinator.expected import firing_of, load_of
from warmfront.coordinator.firing import ensure_profiled
from warmfront.coordinator.network import LOST
from warmfront.coordinator.packer import ensure_packed
from warmfront.coordinator.placement import most_active, place_homes
from warmfront.coordinator.plan_file import read_plan
from warmfront.coordinator.sampling import Sampler
from warmfront.coordinator.stats import Selection, Stats, Token, WorkerStats
from warmfront.coordinator.stops import StopText
from warmfront.coordinator.supervisor import Supervisor
from warmfront.coordinator.tokenizer import Tokenizer
from warmfront.coordinator.trace import Trace
from warmfront.shared.board import LANES, Board, BoardSizes
from warmfront.shared.bundle import GROUP
from warmfront.shared.config import PREDICTING, EngineConfig, Sampling, parse_slow
from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.memory import create_shared, map_shared
from warmfront.shared.messages import Hello, LoadReport, Plan
from warmfront.shared.process import hold_interrupts
from warmfront.shared.store import PackedModel
from warmfront.shared.topology import CorePlan, plan_cores, read_topology

if TYPE_CHECKING:
    from warmfront.coordinator.front import Front
    from warmfront.coordinator.lowbit import Lowbit
    from warmfront.coordinator.team import Team
    from warmfront.coordinator.torch_team import TorchTeam

__all__ = ["Engine"]

# Tokens of one prefill job: 18 panels of 16, of which the products take three at a time.
MAX_TOKENS = 288
# Share of a GPU's free memory that is filled when no budget is given.
_VRAM_SHARE = 0.9
# Part of a CPU worker's groups for which it has slots more, where there are several: groups move into them.
_SPARE_SHARE = 1 / 32
_LOOK_S = 0.005
# Of how many decoded tokens one has its selection measured.
_MEASURE_EVERY = 64
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def _quiet(_message: str) -> None:
    pass


def _set(words: npt.NDArray[np.int64], names: Sequence[str], name: str) -> None:
    words[names.index(name)] = 1


def _no_progress(_what: str, _done: int, _total: int) -> None:
    pass


class Engine:
    """A loaded model and everything that runs it: made by `Engine.load`, ended by `close` or a with block."""

    def __init__(self, model: PackedModel, config: EngineConfig, *, profiles: bool = False) -> None:
        self.model = model
        self._profiles = profiles
        self.config = config
        self.tokenizer = Tokenizer(model)
        self.selector = choose_selector(config, model)
        self.context = choose_context(config, model)
        self.attention = choose_attention(config, self.selector)
        self.stats = Stats()
        self._closed = False
        self._decoded, self._measures = 0, False
        self.lowbit: Lowbit | None = None
        self.front: Front
        self._trace = Trace(Path(config.trace)) if config.trace is not None else None
        self._cached: list[int] = []  # the tokens that the KV cache holds
        self._closing = contextlib.ExitStack()
        self._closing.callback(model.close)
        self._closing.callback(self._forget)

    @classmethod
    def load(
        cls, model: str = DEFAULT_MODEL, *, say: Say = _quiet, progress: Progress = _no_progress, **wishes: Any
    ) -> Self:
        """Load `model` (a GGUF file, a Hugging Face folder or "smollm2-135m") and start its workers.

        `wishes` are the fields of `EngineConfig`. `say` gets a line for each thing worth knowing, `progress` (what,
        bytes done, bytes in all). Raises a WarmfrontError; then nothing is left running.
        """
        started = time.monotonic()
        config = EngineConfig(**wishes)
        # What cannot be had is refused before the model is packed.
        plan_cores(read_topology(), config.workers, config.threads)
        choose_gpu(config)
        choose_attention(config, config.selector)
        path = ensure_packed(resolve(model, say), config.dtype, say, partial(progress, "packing"))
        engine = cls._opened(path, config)
        try:
            if ensure_profiled(engine.model, config, say, progress):
                engine.close()
                engine = cls._opened(path, config)
            engine._run_up(say, progress)
        except BaseException:
            engine.close()
            raise
        engine.stats.load_s = time.monotonic() - started
        return engine

    @classmethod
    def for_profiling(
        cls, path: Path, config: EngineConfig, *, say: Say = _quiet, progress: Progress = _no_progress
    ) -> Self:
        """Load the packed model at `path` as it is, ready to say which neurons fire; else as `load` does."""
        engine = cls._opened(path, config, profiles=True)
        try:
            engine._run_up(say, progress)
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def _opened(cls, path: Path, config: EngineConfig, *, profiles: bool = False) -> Self:
        packed = PackedModel(path)
        try:
            return cls(packed, config, profiles=profiles)
        except BaseException:
            packed.close()
            raise

    def _run_up(self, say: Say, progress: Progress) -> None:
        """Start everything and wait until it has loaded."""
        cores = plan_cores(read_topology(), self.config.workers, self.config.threads)
        gpu = choose_gpu(self.config)
        if gpu == "host":
            cores = cores.with_emulated_gpu()
        self._start(cores, gpu, say)
        self._wait(partial(progress, "loading"))
        self._open_front(partial(progress, "filling the GPU"))
        if self.lowbit is not None and not self.lowbit.calibrated:
            self._calibrate(self.lowbit, say)
        self._measures = self.config.measure

    def _start(self, cores: CorePlan, gpu: str | None, say: Say) -> None:
        """Make the board, start the workers and the team."""
        self._check_memory()
        self.cores = cores
        modules = {f"cpu{i}": "warmfront.cpu_worker" for i in range(len(cores.workers))}
        if gpu is not None:
            modules["gpu0"] = "warmfront.gpu_worker"
        names = list(modules)
        if unknown := parse_slow(self.config.slow).keys() - set(names):
            raise UsageError(f"--slow names worker {min(unknown)}, but there are only {', '.join(names)}")
        spec, layout = self.model.spec, self.model.layout
        self._home = place_homes(layout.groups, spec.layers, [len(worker.cpus) for worker in cores.workers])
        most = min(MAX_TOKENS, -(-self.context // LANES) * LANES)
        sizes = BoardSizes(len(modules), spec.layers, layout.groups, spec.hidden, most, int(self._profiles))
        fd = create_shared("warmfront-board", sizes.total)
        self._closing.callback(os.close, fd)
        self._board = Board.create(map_shared(fd), sizes)
        self._gone = np.zeros(len(names), np.int64)
        self._apart = self._attention_bytes()
        self._supervisor = Supervisor(
            modules,
            fd,
            partial(self._make_plans, cores, names),
            partial(_set, self._gone, names),
            self._abort,
            {"WARMFRONT_GPU": gpu or ""},
            [name for name in names if name.startswith("gpu")],
        )
        self._closing.callback(self._supervisor.stop)
        # The workers are starting by now; numba's import and compilation here run beside theirs.
        self._team = self._make_team(cores, say)
        self._closing.callback(self._team.stop)
        self._team.start()

    def _make_team(self, cores: CorePlan, say: Say) -> "Team | TorchTeam":
        if self.attention != "cpu":
            with hold_interrupts():
                from warmfront.coordinator.torch_team import TorchTeam

            device = "cpu" if self.attention == "host" else self.attention
            ahead, cpus = self.config.look_ahead, cores.coordinator
            return TorchTeam(self.model, self._board, self._gone, device, cpus, self.context, self.selector, ahead)
        with hold_interrupts():
            from warmfront.coordinator.forward import serve_team
            from warmfront.coordinator.lowbit import open_lowbit
            from warmfront.coordinator.team import Team
            from warmfront.shared.jit import cache_is_cold

        if cache_is_cold(serve_team):
            say("compiling kernels (first run only)")
        if self.selector == "lowbit":
            self.lowbit = open_lowbit(self.model, self.config.bits, self.config.recall, say)
            self._closing.callback(self.lowbit.file.close)
        return Team(
            self.model,
            self._board,
            self._gone,
            cores.coordinator,
            self.context,
            self.selector,
            self.lowbit,
            self.config.look_ahead,
        )

    def _attention_bytes(self) -> int:
        """Bytes that attention takes on a GPU."""
        if not self.attention.startswith("cuda"):
            return 0
        from warmfront.coordinator.torch_network import device_bytes

        return device_bytes(self.model, self.context, self.selector)

    def _wait(self, progress: Callable[[int, int], None]) -> None:
        """Until the workers and the team have loaded."""
        while not (self._supervisor.ready() and self._team.ready()):
            parts = (self._team.progress(), self._supervisor.loaded)
            progress(sum(done for done, _ in parts), sum(total for _, total in parts))
            time.sleep(_LOOK_S)

    def _calibrate(self, lowbit: "Lowbit", say: Say) -> None:
        from warmfront.coordinator.calibration import calibrate, sample_ids

        say(f"calibrating the selector for a recall of {lowbit.recall:g} (first use only)")
        lowbit.thresholds[:] = -np.inf  # until they are known, everything is selected
        calibrate(lowbit, self.model, self.feed_forward_inputs(sample_ids(self)))
        self.reset()

    def feed_forward_inputs(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the feed-forward layers get, after their norm, for each token: float32 [layers, len(ids), hidden].

        Only with the selector lowbit. What exceeds the context is computed as a text of its own.
        """
        self.reset()
        most, inputs = min(self._board.sizes.max_tokens, self.context), []
        for at in range(0, len(ids), most):
            some = list(ids[at : at + most])
            if len(self._cached) + len(some) > self.context:
                self.reset()
            self._run(some, False, capture=True)
            inputs.append(self._team.captured(len(some)))
        return np.concatenate(inputs, axis=1)

    def firing(self, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which neurons each of up to 288 tokens fires, computed anew from an empty cache: [layers, tokens, neurons].

        Only of an engine that profiles, without a GPU.
        """
        self.reset()
        # A single token would take the way of decoding, which does not note this.
        self._run([*ids, ids[0]] if len(ids) == 1 else list(ids), False)
        return self._fired(len(ids))

    def _fired(self, tokens: int) -> npt.NDArray[np.bool_]:
        """Of the last job, from the board's [layers, groups, 32, panels] of 16 tokens a word."""
        layers, groups, neurons, panels = self._board.firing.shape
        bits = np.unpackbits(self._board.firing.view(np.uint8), bitorder="little").astype(bool)
        bits = bits.reshape(layers, groups * neurons, panels * LANES)[:, :, :tokens]
        return np.ascontiguousarray(bits.swapaxes(1, 2))

    def _make_plans(self, cores: CorePlan, names: Sequence[str], hellos: Mapping[str, Hello]) -> dict[str, Plan]:
        """What each worker is to do; called by the supervisor once they have said Hello."""
        slow, several = parse_slow(self.config.slow), len(cores.workers) > 1
        plans = {}
        for name, hello in hellos.items():
            index, on_gpu = names.index(name), name.startswith("gpu")
            spare = int(np.count_nonzero(self._home == index) * _SPARE_SHARE) + 1 if several and not on_gpu else 0
            plans[name] = Plan(
                index=index,
                model=os.fspath(self.model.path),
                order=self.model.order,
                cpus=list(cores.gpu if on_gpu else cores.workers[index].cpus),
                selector=self.selector,
                home=self._home.tobytes(),
                spare=spare,
                slow=slow.get(name, 1.0),
                budget=self._budget(hello) if on_gpu else 0,
            )
        return plans

    def _budget(self, gpu: Hello) -> int:
        """Bytes of device memory that the GPU worker may take."""
        budget, shared = self.config.vram_budget, gpu.device.partition(" ")[0] == self.attention
        free = max(0, gpu.free_bytes - self._apart if shared else gpu.free_bytes)
        if budget is None:
            return int(free * _VRAM_SHARE)
        if budget > free:
            beside = " beside the attention" if shared else ""
            raise ResourceError(
                f"a VRAM budget of {budget / 1e9:.2f} GB, but {gpu.device} has {free / 1e9:.2f} GB free{beside}: "
                "pass a smaller --vram-budget"
            )
        return budget

    def _open_front(self, progress: Callable[[int, int], None]) -> None:
        """Give the GPU what it begins with."""
        from warmfront.coordinator.balancer import make_policy
        from warmfront.coordinator.front import Front

        self._apart = 0  # Attention has its memory by now: a GPU worker that starts again finds what is left.
        layout, names = self.model.layout, list(self._supervisor.hellos)
        expected = self.expected_bytes()
        policy = make_policy(self.config.policy, expected, layout.group_bytes)
        predicted = self.selector in PREDICTING
        self.front = Front(
            self._board, layout, self._home, names, predicted, policy, self._supervisor, self._team.present, self._gone
        )
        for worker, name in enumerate(names):
            if name.startswith("gpu"):
                wanted = self._first_on_gpu(expected, self._supervisor.readies[name].slots)
                self.front.fill(worker, wanted, progress)

    def _first_on_gpu(self, expected: npt.NDArray[np.float64], slots: int) -> npt.NDArray[np.bool_]:
        """The groups [layers, groups] that a GPU of so many slots begins with: the plan's, else the most active."""
        if self.config.plan is None:
            return most_active(expected, slots)
        wanted = read_plan(Path(self.config.plan), self.model)
        if (count := int(wanted.sum())) > slots:
            raise UsageError(
                f"the plan {self.config.plan} gives the GPU {count} groups, it holds {slots}: "
                "pass the --vram-budget that the plan was made for"
            )
        return wanted

    def expected_bytes(self) -> npt.NDArray[np.float64]:
        """Bytes that a token is expected to read of each group, by the model's profile: float64 [layers, groups]."""
        return load_of(self.model.layout, self.selector, firing_of(self.model))

    def _check_memory(self) -> None:
        need = sum(entry.nbytes for entry in self.model.entries.values())
        have = sum(node.available_bytes for node in read_topology().nodes)
        if need > have:
            raise ResourceError(
                f"{self.model.spec.name} needs {need / 1e9:.1f} GB, {have / 1e9:.1f} GB of memory are free: "
                "use a smaller --dtype or a smaller model"
            )

    def _forget(self) -> None:
        """Let go of the memory: the supervisor's callbacks make a cycle, which the collector may find much later."""
        for name in ("_team", "_board", "front"):
            self.__dict__.pop(name, None)

    def _abort(self) -> None:
        self._board.abort[0] = 1
        for leave in self._board.leave:
            leave[0] = 1
        self._gone[:] = 1

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Token]:
        """Yield the tokens that follow `prompt` (text or token ids) as they are computed.

        Ends after `max_new_tokens`, at an end-of-turn token, before a stop string, or when the context is full. The
        end-of-turn token itself is yielded only if it brings text that was held back for a stop string.
        Raises UsageError if the prompt does not fit the context, WorkerError if a worker dies.
        """
        ids = self.prompt_ids(prompt)
        sampler = Sampler(sampling or Sampling())
        text, stops = self.tokenizer.stream(), StopText(stop)
        self.stats = Stats(load_s=self.stats.load_s, prompt_tokens=len(ids))
        logits = self._prefill(ids)
        first_at = time.monotonic()
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            token = sampler.pick(logits, [*ids, *answer])
            answer.append(token)
            self.stats.new_tokens = len(answer)
            self.stats.decode_s = time.monotonic() - first_at
            if token in self.tokenizer.end_ids:
                if rest := stops.rest():
                    yield Token(token, rest)
                return
            piece = stops.push(text.push(token))
            last = len(answer) == max_new_tokens or len(ids) + len(answer) >= self.context
            yield Token(token, piece + stops.rest() if last else piece)
            if last or stops.found:
                return
            logits = self.step(token)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt, checked against vocabulary and context."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        vocab = self.model.spec.vocab
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        if wrong := [token for token in ids if not 0 <= token < vocab]:
            raise UsageError(f"token id {wrong[0]} is outside the vocabulary of {vocab}")
        if len(ids) >= self.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context holds {self.context} with the answer: "
                "shorten it or pass a larger --ctx"
            )
        return ids

    def decode_ids(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` greedy tokens that follow `ids` after the first, past any end of the text: for measurements."""
        self.stats = Stats(load_s=self.stats.load_s, prompt_tokens=len(ids), new_tokens=count + 1)
        logits, answer = self._prefill(self.prompt_ids(ids)), []
        started = time.monotonic()
        for _ in range(count):
            answer.append(int(np.argmax(logits)))
            logits = self.step(answer[-1])
        self.stats.decode_s = time.monotonic() - started
        return answer

    def forced_logits(self, ids: Sequence[int], prefill: int) -> Iterator[npt.NDArray[np.float32]]:
        """Teacher forcing: prefill the first `prefill` tokens, then decode the rest one at a time.

        Yields float32 [vocab] logits after the prefill and after each further token: how quality is measured, since
        prefill alone is dense and never takes the sparse path.
        """
        ids = self.prompt_ids(ids)
        self.reset()
        yield self._prefill(ids[:prefill]).copy()
        for token in ids[prefill:]:
            yield self.step(token).copy()

    def _prefill(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits after `ids`; what the cache already holds of them is not computed again."""
        self._check_open()
        started = time.monotonic()
        known = 0
        while known < min(len(self._cached), len(ids) - 1) and self._cached[known] == ids[known]:
            known += 1
        del self._cached[known:]
        most = self._board.sizes.max_tokens
        while len(self._cached) < len(ids):
            at = len(self._cached)
            self._run(ids[at : at + most], at + most >= len(ids))
        self.stats.prefilled = len(ids) - known
        self.stats.prefill_s = time.monotonic() - started
        return self._logits

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Logits, float32 [vocab], after one token more behind what the cache holds; valid until the next job."""
        measure = self._measures and self._decoded % _MEASURE_EVERY == 0
        self._decoded += 1
        self._run([token], True, measure=measure)
        return self._logits

    def _run(self, tokens: list[int], want_logits: bool, *, measure: bool = False, capture: bool = False) -> None:
        """One job, and what the front has to do before and after it, which no Ctrl-C may leave half done."""
        with hold_interrupts():
            self._check_open()
            self._supervisor.check()
            self.front.boundary()
            at = len(self._cached)
            while (result := self._team.run(tokens, at, want_logits, measure=measure, capture=capture)) != 0:
                if result != LOST or not self.front.lose():
                    self._supervisor.wait_for_error()
            if len(tokens) == 1:
                self.front.observe()
                if self.config.verify:
                    self.front.verify()
            if self._trace is not None:
                self._trace.note(at, len(tokens), *self._team.times())
            self._cached += tokens

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed: load the model again")

    @property
    def _logits(self) -> npt.NDArray[np.float32]:
        return self._team.logits

    def workers(self) -> list[WorkerStats]:
        """What each worker has done since the model was loaded."""
        self._check_open()
        reports = self._supervisor.reports()
        stats = []
        for index, (name, hello) in enumerate(self._supervisor.hellos.items()):
            report = reports.get(name, LoadReport(0, [], [], [], [0] * 4))
            groups = int(np.count_nonzero(self._board.owner == index))
            busy = sum(report.busy_ns) / 1e9
            read = sum(report.bytes)
            stats.append(
                WorkerStats(name, hello.device, hello.pid, busy, sum(report.neurons), read, groups, report.jobs)
            )
        return stats

    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """When what of the last job was done: see `Team.times`."""
        return self._team.times()

    def reports(self) -> Mapping[str, LoadReport]:
        """What each worker has done on single tokens, by layers; the front's fit goes on from there."""
        self._check_open()
        return self._supervisor.reports()

    def device_memory(self) -> dict[str, int]:
        """Bytes of the GPU worker's memory by purpose; empty without one."""
        return {purpose: size for ready in self._supervisor.readies.values() for purpose, size in ready.ledger.items()}

    def selection(self) -> Selection | None:
        """How the selected neurons compare with those that fire; None if nothing was predicted and measured."""
        measured = np.array([report.measured for report in self._supervisor.reports().values()])
        if self.selector not in PREDICTING or not self.model.spec.sparse or not measured[0, 0]:
            return None
        neurons = int(measured[0, 0]) * self.model.layout.groups * GROUP
        selected, fired, hit = (int(column) for column in measured[:, 1:].sum(0))
        return Selection(fired / neurons, selected / neurons, hit / max(fired, 1), hit / max(selected, 1))

    def coordinator_bytes(self) -> dict[str, int]:
        """Bytes of weights that the coordinator reads for a token: attention, predictor, head."""
        entries = dict(self.model.entries)
        if self.lowbit is not None:
            entries |= self.lowbit.file.entries
        roles = {name: name.rpartition(".")[2] for name in entries if name.startswith("layers.")}
        predicting = {"lowrank": ("fc1", "fc2"), "lowbit": ("lowbit",)}.get(self.selector, ())
        return {
            "attention": sum(entries[name].nbytes for name, role in roles.items() if role in ("q", "k", "v", "o")),
            "predictor": sum(entries[name].nbytes for name, role in roles.items() if role in predicting),
            "head": entries["head" if "head" in entries else "embed"].nbytes,
        }

    def active_fraction(self, workers: Sequence[WorkerStats]) -> float | None:
        """Share of all neurons that were computed, over all single-token jobs; None if there were none."""
        layout = self.model.layout
        passes = workers[0].jobs
        total = passes * layout.groups * GROUP
        return sum(worker.neurons for worker in workers) / total if total else None

    def reset(self) -> None:
        """Forget the KV cache: the next prompt is computed from its first token."""
        self._cached.clear()

    def close(self) -> None:
        """End the workers and the team; may be called twice."""
        if self._trace is not None and not self._closed:
            transfers = self.front.transfers if hasattr(self, "front") else ()
            self._closing.callback(
                self._trace.close, {name: hello.pid for name, hello in self._hellos().items()}, transfers
            )
        self._closed = True
        self._closing.close()

    def _hellos(self) -> Mapping[str, Hello]:
        """Of the workers, where they have come up."""
        return self._supervisor.hellos if hasattr(self, "_supervisor") else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
