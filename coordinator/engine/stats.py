"""What generation yields and what it costs: tokens, rates, each worker's share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.session import Session
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.offload import CacheCounters
from warmfront.shared.selector import Source
from warmfront.shared.wire.messages import LoadReport

if TYPE_CHECKING:
    from warmfront.coordinator.engine.text_core import CoreFacts

__all__ = ["Selection", "Statistics", "Stats", "Token", "WorkerStats"]


class Token(NamedTuple):
    """One generated token; `text` is what it completes, and may be empty.

    If asked for: its log probability, and the most probable tokens (id, log probability).
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Selection(NamedTuple):
    """How well the predicted neurons met those that fire: shares of all neurons, then recall and precision."""

    fired: float
    selected: float
    recall: float
    precision: float


@dataclass(slots=True)
class Stats:
    """What the last answer cost. Rates are tokens a second; decode counts the tokens after the first."""

    load_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    # Prompt tokens that were computed: the rest was in the KV cache.
    prefilled: int = 0
    # Tokens that were guessed and computed with those before them, and how many of them came true.
    drafted: int = 0
    accepted: int = 0
    # "stop" at an end-of-turn token or a stop string, "length" after the most tokens or at the context's end, None
    # while the answer goes on.
    finish_reason: str | None = None
    # Of `decode_ids`, with a RAM budget: what the caches counted behind the prompt.
    cache: CacheCounters | None = None

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed per second."""
        return self.prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """New tokens per second, without the first."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker's work on single tokens since the model was loaded."""

    name: str
    device: str
    pid: int
    busy_s: float
    # Computed in all.
    neurons: int
    # Of weights read.
    bytes: int
    # Owned now.
    groups: int
    jobs: int
    # Bytes of weights held by NUMA node, as the kernel says where they lie; empty for a GPU.
    nodes: dict[str, int]


class Statistics:
    """What a session's workers have done, as they report it."""

    def __init__(self, session: Session) -> None:
        self._session, self._runtime = session, session.runtime
        self._worked = np.zeros((0, 0, 2), np.int64)  # the sums of `times` over the passes of the last answer
        self._began = 0  # when the last of them did

    def workers(self) -> list[WorkerStats]:
        """What each worker has done since the model was loaded."""
        self._session.check_open()
        supervisor, owners = self._runtime.supervisor, self._runtime.ownership.owners()
        reports, stats = supervisor.reports(), []
        for index, (name, hello) in enumerate(supervisor.hellos.items()):
            report = reports.get(name, LoadReport(0, [], [], [], [0] * 4))
            busy, read, neurons = sum(report.busy_ns) / 1e9, sum(report.bytes), sum(report.neurons)
            groups = int(np.count_nonzero(owners == index))
            nodes = {} if name.startswith("gpu") else dict(supervisor.readies[name].ledger)
            stats.append(WorkerStats(name, hello.device, hello.pid, busy, neurons, read, groups, report.jobs, nodes))
        return stats

    def reports(self) -> Mapping[str, LoadReport]:
        """What each worker has done on single tokens, by layers; the balancer's fit goes on from there."""
        self._session.check_open()
        return self._runtime.supervisor.reports()

    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """When what of the last job was done: see `ThreadTeam.times`."""
        self._session.check_open()
        return self._runtime.times()

    def begin_answer(self) -> None:
        """The first token of an answer was computed."""
        self._worked = np.zeros_like(self.times()[1])

    def add_token(self) -> None:
        """Another one was, perhaps in the same pass."""
        steps, spans = self.times()
        if steps[0, 0] != self._began:
            self._began = int(steps[0, 0])
            self._worked += spans

    def cache(self) -> CacheCounters | None:
        """What the caches of all CPU workers counted since the model was loaded; None without a RAM budget."""
        numbers = [report.cache for report in self.reports().values() if report.cache]
        return CacheCounters.of([sum(column) for column in zip(*numbers, strict=True)]) if numbers else None

    def busy_shares(self, decode_s: float) -> dict[str, float]:
        """Of each worker the part of the last answer's `decode_s` that it computed, 1 at most; 0 without an answer."""
        names = self._runtime.plan.worker_names
        if not self._worked.size:
            return dict.fromkeys(names, 0.0)
        busy_s = (self._worked[:, :, 1] - self._worked[:, :, 0]).sum(0) / 1e9
        return dict(zip(names, np.clip(busy_s / max(decode_s, 1e-9), 0, 1).tolist(), strict=True))

    def device_memory(self) -> dict[str, int]:
        """Bytes of the GPU worker's memory by purpose; empty without one."""
        self._session.check_open()
        readies = self._runtime.supervisor.readies.items()
        return {what: size for name, ready in readies if name.startswith("gpu") for what, size in ready.ledger.items()}

    def selection(self) -> Selection | None:
        """How the selected neurons compare with those that fire; None if nothing was predicted and compared."""
        compared = np.array([report.compared for report in self.reports().values()])
        model = self._session.model
        if not self._runtime.plan.selector.masked or not model.spec.sparse or not compared[0, 0]:
            return None
        neurons = int(compared[0, 0]) * model.layout.groups * GROUP
        selected, fired, hit = (int(column) for column in compared[:, 1:].sum(0))
        return Selection(fired / neurons, selected / neurons, hit / max(fired, 1), hit / max(selected, 1))

    def core(self) -> "CoreFacts | None":
        """What became of the cores of this session's texts; None without a selector that has them."""
        self._session.check_open()
        return self._session.core.facts if self._session.core is not None else None

    def expert_uses(self) -> npt.NDArray[np.int64] | None:
        """How many tokens each expert was chosen for since the model was loaded, those of prompts too: int64 [layers,
        experts], zeros in layers without experts; None for a model without."""
        self._session.check_open()
        spec = self._session.model.spec
        experts = spec.architecture.feed_forward.experts
        if experts is None:
            return None
        uses = self._runtime.team.uses()[:, 1 : 1 + experts.number].copy()
        uses[list(experts.dense_layers)] = 0
        return uses

    def active_fraction(self, workers: Sequence[WorkerStats]) -> float | None:
        """Share of all neurons that were computed, over all single-token jobs; None if there were none."""
        model = self._session.model
        # Of layers without experts some groups have no weights; the jobs are the same number of each layer.
        total = workers[0].jobs * sum(model.groups) * GROUP / model.spec.layers
        return sum(worker.neurons for worker in workers) / total if total else None

    def coordinator_bytes(self) -> dict[str, int]:
        """Bytes of weights that the coordinator reads for a token: attention, predictor, head."""
        entries = dict(self._session.model.entries)
        if self._runtime.lowbit is not None:
            entries |= self._runtime.lowbit.file.entries
        roles = {name: name.rpartition(".")[2] for name in entries if name.startswith("layers.")}
        parts = {Source.LOWRANK: ("fc1", "fc2"), Source.LOWBIT: ("lowbit",), Source.CORE: ()}
        predicting = {role for source in self._runtime.plan.selector.sources for role in parts[source]}
        return {
            "attention": sum(entries[name].nbytes for name, role in roles.items() if role in ("q", "k", "v", "o")),
            "predictor": sum(entries[name].nbytes for name, role in roles.items() if role in predicting),
            "head": entries["head" if "head" in entries else "embed"].nbytes,
        }
