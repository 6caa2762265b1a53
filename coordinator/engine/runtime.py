"""Everything that runs a model: the worker processes, the team of threads, the board between them, the front.

The start in order: board; worker processes and team, which compile and load at the same time; the GPU's first groups.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.footprint import cache_bytes, scratch_bytes
from warmfront.coordinator.decode.network import LOST
from warmfront.coordinator.engine.resolve import choose_cores
from warmfront.coordinator.hardware.node_bandwidth import worker_speeds
from warmfront.coordinator.placement.expected_load import firing_of, load_of
from warmfront.coordinator.placement.homes import bytes_by_node, most_active, place_homes
from warmfront.coordinator.placement.plan_file import read_plan
from warmfront.coordinator.workers.supervisor import Supervisor
from warmfront.shared.config import PREDICTING, EngineConfig, parse_slow
from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.memory import address, create_shared, map_shared
from warmfront.shared.machine.numa import UNBOUND, bindable, ensure_free
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.board import LANES, Board, BoardSizes
from warmfront.shared.wire.messages import Hello, Plan

if TYPE_CHECKING:
    from warmfront.coordinator.balancing.ownership import Ownership
    from warmfront.coordinator.decode.thread_team import ThreadTeam
    from warmfront.coordinator.decode.torch_team import TorchTeam
    from warmfront.coordinator.selectors.lowbit import Lowbit

__all__ = ["Runtime"]

# Tokens of one prefill job: 18 panels of 16, of which the products take three at a time.
MAX_TOKENS = 288
# Share of a GPU's free memory that is filled when no budget is given.
_VRAM_SHARE = 0.9
# Part of a CPU worker's groups for which it has slots more, where there are several: groups move into them. They take
# memory only once they are used.
_SPARE_SHARE = 1 / 2
_LOOK_S = 0.005
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


class Runtime:
    """Made empty, then `start`ed once, then `run` one job at a time; `close` ends it at any point."""

    def __init__(
        self, model: PackedModel, config: EngineConfig, selector: str, context: int, attention: str, profiles: bool
    ) -> None:
        self.model, self.config, self.selector = model, config, selector
        self.context, self.attention, self.profiles = context, attention, profiles
        self.lowbit: Lowbit | None = None
        self.cores: CorePlan
        self.board: Board
        self.supervisor: Supervisor
        self.team: ThreadTeam | TorchTeam
        self.ownership: Ownership
        self._closing = contextlib.ExitStack()
        self._closing.callback(self._forget)

    def start(self, say: Say, progress: Progress) -> None:
        """Start everything and wait until it has loaded."""
        cores = choose_cores(self.config)
        gpu = None if self.config.gpu == "none" else self.config.gpu
        if gpu == "host":
            cores = cores.with_emulated_gpu()
        self._launch(cores, gpu, say)
        self._wait(partial(progress, "loading"))
        self._open_front(say, partial(progress, "filling the GPU"))

    def _launch(self, cores: CorePlan, gpu: str | None, say: Say) -> None:
        """Make the board, start the workers and the team."""
        self._check_memory(cores, gpu)
        for note in cores.notes:
            say(note)
        self.cores = cores
        modules = {f"cpu{i}": "warmfront.cpu_worker" for i in range(len(cores.workers))}
        if gpu is not None:
            modules["gpu0"] = "warmfront.gpu_worker"
        names = list(modules)
        if unknown := parse_slow(self.config.slow).keys() - set(names):
            raise UsageError(f"--slow names worker {min(unknown)}, but the only workers are {', '.join(names)}")
        spec, layout = self.model.spec, self.model.layout
        self._home = place_homes(layout.groups, spec.layers, worker_speeds(cores))
        self._check_nodes(cores, say)
        most = self._max_tokens
        sizes = BoardSizes(len(modules), spec.layers, layout.groups, spec.hidden, most, int(self.profiles))
        fd = create_shared("warmfront-board", sizes.total)
        self._closing.callback(os.close, fd)
        self.board = Board.create(map_shared(fd), sizes)
        self._gone = np.zeros(len(names), np.int64)
        self._apart = self._attention_bytes()
        self.supervisor = Supervisor(
            modules,
            fd,
            partial(self._make_plans, cores, names),
            partial(self._lose, names),
            self._abort,
            {"WARMFRONT_GPU": gpu or ""},
            [name for name in names if name.startswith("gpu")],
        )
        self._closing.callback(self.supervisor.stop)
        # The workers are starting by now; numba's import and compilation here run beside theirs.
        self.team = self._make_team(cores, say)
        self._closing.callback(self.team.stop)
        self.team.start()

    def _make_team(self, cores: CorePlan, say: Say) -> "ThreadTeam | TorchTeam":
        if self.attention != "cpu":
            with hold_interrupts():
                from warmfront.coordinator.decode.torch_team import TorchTeam

            device = "cpu" if self.attention == "host" else self.attention
            ahead, cpus = self.config.look_ahead, cores.coordinator
            return TorchTeam(self.model, self.board, self._gone, device, cpus, self.context, self.selector, ahead)
        with hold_interrupts():
            from warmfront.coordinator.decode.forward import serve_team
            from warmfront.coordinator.decode.thread_team import ThreadTeam
            from warmfront.coordinator.selectors.lowbit import open_lowbit
            from warmfront.shared.kernels.jit import cache_is_cold, compiling_note

        if cache_is_cold(serve_team):
            say(compiling_note())
        if self.selector == "lowbit":
            self.lowbit = open_lowbit(self.model, self.config.bits, self.config.recall, say)
            self._closing.callback(self.lowbit.file.close)
        return ThreadTeam(
            self.model,
            self.board,
            self._gone,
            cores,
            self.config.pin,
            self.context,
            self.selector,
            self.lowbit,
            self.config.look_ahead,
            self.config.policy == "balance",
        )

    def _attention_bytes(self) -> int:
        """Bytes that attention takes on a GPU."""
        if not self.attention.startswith("cuda"):
            return 0
        from warmfront.coordinator.decode.torch_network import device_bytes

        return device_bytes(self.model, self.context, self.selector)

    def _wait(self, progress: Callable[[int, int], None]) -> None:
        """Until the workers and the team have loaded."""
        # The team first: it removes a damaged file, which a worker may then find gone.
        while not (self.team.ready() and self.supervisor.ready()):
            parts = (self.team.progress(), self.supervisor.loaded)
            progress(sum(done for done, _ in parts), sum(total for _, total in parts))
            time.sleep(_LOOK_S)

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
                memory=-1 if on_gpu or (node := cores.workers[index].memory) is None else node,
                pinned=self.config.pin,
                spins=cores.spins,
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

    def _open_front(self, say: Say, progress: Callable[[int, int], None]) -> None:
        """Give the GPU what it begins with."""
        from warmfront.coordinator.balancing.balance import make_policy
        from warmfront.coordinator.balancing.ownership import Ownership

        self._apart = 0  # Attention has its memory by now: a GPU worker that starts again finds what is left.
        layout, names = self.model.layout, list(self.supervisor.hellos)
        expected = self.expected_bytes()
        policy = make_policy(self.config.policy, expected, layout.group_bytes)
        predicted = self.selector in PREDICTING
        self.ownership = Ownership(
            self.board,
            layout,
            self._home,
            names,
            predicted,
            policy,
            self.supervisor,
            self.team.present,
            self._gone,
            say,
        )
        for worker, name in enumerate(names):
            if name.startswith("gpu"):
                wanted = self._first_on_gpu(expected, self.supervisor.readies[name].slots)
                self.ownership.fill(worker, wanted, progress)

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

    def _check_nodes(self, cores: CorePlan, say: Say) -> None:
        """Refuse what the nodes cannot hold: the kernel would not refuse to bind it, but kill later."""
        if not bindable(cores.memory_nodes):
            say(UNBOUND)
            return
        group_bytes = self.model.layout.group_bytes
        others = sum(entry.nbytes for entry in self.model.entries.values()) - self._home.size * group_bytes
        for node, need in bytes_by_node(cores, self._home, group_bytes, max(0, others)).items():
            ensure_free(node, need)

    @property
    def _max_tokens(self) -> int:
        """Tokens of the longest job."""
        return min(MAX_TOKENS, -(-self.context // LANES) * LANES)

    def _check_memory(self, cores: CorePlan, gpu: str | None) -> None:
        """Refuse what would be killed for want of memory, perhaps in the middle of an answer."""
        spec, layout = self.model.spec, self.model.layout
        needs = {"weights": sum(entry.nbytes for entry in self.model.entries.values())}
        if not self.attention.startswith("cuda"):
            scratch = scratch_bytes(spec, self.context, len(cores.coordinator), self._max_tokens)
            needs[f"a context of {self.context} tokens"] = cache_bytes(self.model, self.context) + scratch
        if gpu == "host":
            slots = spec.layers * layout.groups * layout.group_bytes
            budget = self.config.vram_budget
            needs["the emulated GPU"] = slots if budget is None else min(slots, budget)
        need, have = sum(needs.values()), read_topology().available_bytes
        if need > have:
            parts = ", ".join(f"{size / 1e9:.2f} for {what}" for what, size in needs.items())
            raise ResourceError(
                f"{spec.name} needs {need / 1e9:.2f} GB ({parts}), {have / 1e9:.2f} GB of memory are free: "
                "pass a smaller --ctx or --dtype, or use a smaller model"
            )

    def _forget(self) -> None:
        """Let go of the memory: the supervisor's callbacks make a cycle, which the collector may find much later."""
        for name in ("team", "board", "front"):
            self.__dict__.pop(name, None)

    def _lose(self, names: Sequence[str], name: str) -> None:
        """A worker is dead: whoever waits for it is to look."""
        from warmfront.shared.wire.handoff import wake

        worker = names.index(name)
        self._gone[worker] = 1
        wake(address(self.board.done[worker]))

    def _abort(self) -> None:
        self.board.end()
        self._gone[:] = 1

    def run(
        self, tokens: list[int], at: int, want_logits: bool, *, measure: bool = False, capture: bool = False
    ) -> None:
        """One job of `tokens` at position `at`, and what the front has to do before and after it; see `ThreadTeam.run`.

        Raises what ended the workers. No Ctrl-C may leave it half done: hold interrupts.
        """
        self.team.check()
        self.supervisor.check()
        self.ownership.boundary()
        while (result := self.team.run(tokens, at, want_logits, measure=measure, capture=capture)) != 0:
            if result != LOST or not self.ownership.lose():
                self.supervisor.wait_for_error()
        if len(tokens) == 1:
            self.ownership.observe()
            if self.config.verify:
                self.ownership.verify()

    def workers(self) -> Mapping[str, Hello]:
        """Those that have come up, in the order of the board."""
        return self.supervisor.hellos if hasattr(self, "supervisor") else {}

    def close(self) -> None:
        """End what runs; may be called twice."""
        self._closing.close()
