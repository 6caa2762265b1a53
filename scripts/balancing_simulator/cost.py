"""What balancing costs the coordinator: the table of owners and a policy, with neither workers nor a model."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from warmfront.coordinator.balancing.ownership import Ownership
from warmfront.coordinator.balancing.policies import make_policy
from warmfront.coordinator.placement.homes import most_active
from warmfront.coordinator.workers.events import DeliverMoved
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import Kind
from warmfront.shared.wire.board import Board, BoardSizes
from warmfront.shared.wire.messages import LoadReport, Move, Moved, Ready

NAMES = ("cpu0", "gpu0")
COSTS = ((10_000.0, 0.03), (20_000.0, 0.002))  # ns per job, ns per byte


class Shape(NamedTuple):
    """Of the feed-forward layers."""

    layers: int
    experts: int
    groups: int  # of an expert
    used: int  # experts that a token uses
    hidden: int


class Workers:
    """Stand in for the worker processes: what is asked for is there at the next token."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.readies = {name: Ready(0, count, {}) for name, count in zip(NAMES, slots, strict=True)}
        self.pending: list[Any] = []
        self.report: Mapping[str, LoadReport] | None = None

    def move(self, worker: str, move: Move) -> None:
        """Copied at once."""
        self.pending.append(DeliverMoved(worker, Moved(move.batch, 100_000)))

    def news(self, wait_s: float = 0.0) -> list[Any]:
        """What was copied."""
        told, self.pending = self.pending, []
        return told

    def check(self) -> None:
        """They live."""

    def request_reports(self) -> None:
        """`report` is up to date."""

    def reported(self) -> Mapping[str, LoadReport] | None:
        """The last one."""
        return self.report


def popular(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """How likely each expert is, [layers, experts]: a tenth of them gets 80 % of the choices."""
    hot = max(1, shape.experts // 10)
    chances = np.r_[np.full(hot, 0.8 / hot), np.full(shape.experts - hot, 0.2 / (shape.experts - hot))]
    return np.stack([rng.permutation(chances) for _ in range(shape.layers)])


def measure(shape: Shape, rate: float, vram: float, tokens: int, topics: int, policy: str) -> dict[str, Any]:
    """Observe and decide for `tokens` that come at `rate` a second; returns us a token, mean and by kind.

    Between two tokens as much of 64 MB is read as the time allows, as by a token that is computed: what the tables
    left in the caches is gone.
    """
    rng = np.random.default_rng(0)
    groups = shape.experts * shape.groups
    layout = BundleLayout(hidden=shape.hidden, ffn=GROUP * groups, gate_kind=Kind.Q4S, down_kind=Kind.Q4S)
    sizes = BoardSizes(len(NAMES), shape.layers, groups, shape.hidden, 16, branches=shape.experts)
    board = Board.create(np.zeros(sizes.total, np.uint8), sizes)
    slots = int(vram * shape.layers * groups)
    workers: Any = Workers((shape.layers * groups, slots))
    chances: Any = popular(rng, shape)
    load = np.repeat(chances * shape.used * layout.group_bytes, shape.groups, axis=1)
    ownership = Ownership(
        board=board,
        layout=layout,
        bounds=shape.groups * np.arange(shape.experts + 1),
        home=np.zeros((shape.layers, groups), np.uint8),
        names=NAMES,
        predicted=True,
        policy=make_policy(policy, load, layout.group_bytes),
        supervisor=workers,
        present=np.ones(2, np.int64),
        dead=np.zeros(2, np.int64),
        say=print,
    )
    ownership.fill(1, most_active(load, slots), lambda _done, _total: None)
    board.computed[:] = 0xFFFFFFFF
    between = np.ones((64, 1 << 17))
    spent = {"observe": 0.0, "boundary": 0.0}
    jobs, busy, read = 0, np.zeros((2, shape.layers)), np.zeros((2, shape.layers))
    slowest = 0.0
    for token in range(tokens):
        if token and token % max(1, tokens // topics) == 0:
            chances = popular(rng, shape)
        chosen = np.log(chances) + rng.gumbel(size=chances.shape)
        experts = np.argpartition(-chosen, shape.used, axis=1)[:, : shape.used]
        mask = np.zeros((shape.layers, shape.experts, shape.groups), np.uint32)
        mask[np.arange(shape.layers)[:, None], experts] = 0xFFFFFFFF
        board.mask[0] = mask.reshape(shape.layers, groups)
        board.uses[0] = mask[:, :, 0] != 0
        started = time.perf_counter_ns()
        ownership.boundary()
        bounded = time.perf_counter_ns()
        chunk = 0
        while time.perf_counter_ns() < bounded + 1e9 / rate:
            between[chunk % len(between)] += 1
            chunk += 1
        begun = time.perf_counter_ns()
        ownership.observe()
        done = time.perf_counter_ns()
        slowest = max(slowest, bounded - started)
        if token >= tokens // 10:
            spent["boundary"] += bounded - started
            spent["observe"] += done - begun
        loads = ownership.layer_loads().T
        jobs, read = jobs + shape.layers, read + loads
        busy += [costs[0] + costs[1] * row for costs, row in zip(COSTS, loads, strict=True)]
        workers.report = {
            name: LoadReport(jobs, busy[i].tolist(), [0] * shape.layers, read[i].tolist(), [0] * 4)
            for i, name in enumerate(NAMES)
        }
    counted = tokens - tokens // 10
    by_kind = {f"{name}_us": round(ns / counted / 1e3, 1) for name, ns in spent.items()}
    us = sum(spent.values()) / counted / 1e3
    return {
        **shape._asdict(),
        "policy": policy,
        "us_a_token": round(us, 1),
        "share_of_a_token": round(us * rate / 1e6, 5),
        **by_kind,
        "observation_us": round(ownership.observing_ns / 1e3, 1),
        "decision_us": round(ownership.deciding_ns / 1e3, 1),
        "slowest_us": round(slowest / 1e3, 1),
        "moves": ownership.flow.moves,
        "hit_share": round(float(ownership.share()[-1]), 3),
    }
