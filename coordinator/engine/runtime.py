"""What runs a model: worker processes, the team of threads, the board between them, the table of owners.

The start in order: board; worker processes and team, which compile and load at the same time; the GPU's first groups.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.prompts import load_by_choices, load_by_firing
from warmfront.coordinator.decode.network import LOST
from warmfront.coordinator.decode.team_config import Place, TeamConfig
from warmfront.coordinator.engine.assignments import make_assignments
from warmfront.coordinator.engine.memory import check_memory, check_nodes
from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.coordinator.engine.uses import uses_of
from warmfront.coordinator.hardware.fetching import distances_for, kept_distances
from warmfront.coordinator.hardware.node_bandwidth import worker_speeds
from warmfront.coordinator.placement.expected_load import expected_bytes, load_of, use_bytes
from warmfront.coordinator.placement.homes import most_active, place_homes, whole_layers
from warmfront.coordinator.placement.plan_file import read_plan
from warmfront.coordinator.workers.supervisor import Supervisor
from warmfront.shared.errors import UsageError, WorkerError
from warmfront.shared.kernels.fetching import usual_distances
from warmfront.shared.machine.memory import address, create_shared, map_shared
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.branches import bounds_of, branches_of
from warmfront.shared.model.noted import Noted
from warmfront.shared.model.panels import LANES
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Source
from warmfront.shared.wire.board import ALL_NEURONS, Board, BoardSizes
from warmfront.shared.wire.messages import Assignment, Hello

if TYPE_CHECKING:
    from warmfront.coordinator.balancing.flow import Transfer
    from warmfront.coordinator.balancing.ownership import Ownership
    from warmfront.coordinator.decode.thread_team import ThreadTeam
    from warmfront.coordinator.decode.torch_team import TorchTeam
    from warmfront.coordinator.selectors.lowbit import Lowbit

__all__ = ["Runtime"]

# Tokens of one prefill job: 18 panels of 16, of which the products take three at a time. A mixture of experts takes
# twice as many, since an expert's weights are read for the few that use it: 3 to 10 % faster in 4 bits.
_MAX_TOKENS, _MAX_TOKENS_OF_EXPERTS = 288, 576
_LOOK_S = 0.005
# Times that a worker may be lost in a job before that is taken for the reason.
_LOSSES = 5
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


class Runtime:
    """Made empty, then `start`ed once, then `run` one job at a time; `close` ends it at any point.

    `profiles`: the board notes which neurons the tokens of a prefill job fire, and their inputs can be captured.
    """

    def __init__(self, model: PackedModel, plan: RunPlan, *, profiles: bool = False) -> None:
        self.model, self.plan, self.profiles = model, plan, profiles
        self.lowbit: Lowbit | None = None
        self._distances = usual_distances()
        self.board: Board
        self.supervisor: Supervisor
        self.team: ThreadTeam | TorchTeam
        self.ownership: Ownership
        self._closing = contextlib.ExitStack()
        self._closing.callback(self._forget)

    def start(self, say: Say, progress: Progress) -> None:
        """Start everything and wait until it has loaded."""
        self._launch(say)
        self._wait(partial(progress, "loading"))
        if self._tuned:
            # Now that the run's kernels are compiled, and idle; the team reads what is chosen from this very table, the
            # workers and its cache from the next start on.
            self._distances[:] = distances_for(uses_of(self.model, self.plan), self.plan.cores.coordinator, say)
        self._open_ownership(say, partial(progress, "filling the GPU"))

    @property
    def _noted(self) -> Noted:
        """What the CPU workers note of a prompt's neurons."""
        if self.profiles or self._places_by_firing:
            return Noted.FIRING
        return Noted.MAGNITUDES if Source.CORE in self.plan.selector.sources else Noted.NOTHING

    @property
    def _places_by_firing(self) -> bool:
        """Whether the policy needs to know what a prompt's tokens fire: experts are known by what the router chose."""
        spec = self.model.spec
        return self.plan.config.policy == "prompt" and spec.sparse and spec.architecture.feed_forward.experts is None

    @property
    def _tuned(self) -> bool:
        """Whether it matters how far ahead is fetched: a profile's jobs of many tokens read each row once for all."""
        return self.plan.config.tuning and not self.profiles

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest job, whole panels of them."""
        most = _MAX_TOKENS if self.model.spec.architecture.feed_forward.experts is None else _MAX_TOKENS_OF_EXPERTS
        return min(most, -(-self.plan.context // LANES) * LANES)

    def _launch(self, say: Say) -> None:
        """Make the board, start the workers and the team."""
        model, plan = self.model, self.plan
        check_memory(model, plan, self.max_tokens)
        for note in plan.cores.notes:
            say(note)
        if self._tuned:
            self._distances = kept_distances(plan.cores.coordinator)
        names, spec, layout = plan.worker_names, model.spec, model.layout
        self._home = place_homes(expected_bytes(model, plan.selector), worker_speeds(plan.cores))
        check_nodes(model, plan, self._home, say)
        sizes = BoardSizes(
            workers=len(names),
            layers=spec.layers,
            groups=layout.groups,
            hidden=spec.hidden,
            max_tokens=self.max_tokens,
            noted=self._noted,
            branches=len(branches_of(spec)),
        )
        fd = create_shared("warmfront-board", sizes.total)
        self._closing.callback(os.close, fd)
        self.board = Board.create(map_shared(fd), sizes)
        if plan.selector.masked and not plan.selector.predicts:
            self.board.mask[:] = ALL_NEURONS
        self._dead = np.zeros(len(names), np.int64)
        self._attention_bytes = self._bytes_on_gpu()
        self.supervisor = Supervisor(
            {name: f"warmfront.{name[:3]}_worker" for name in names},
            fd,
            assign=self._assign,
            on_lost=self._lose,
            on_abort=self._abort,
            # numpy's BLAS would start a thread for each core, which spins; workers multiply nothing with it.
            environment={"WARMFRONT_GPU": plan.gpu or "", "OPENBLAS_NUM_THREADS": "1"},
            optional=names,
            required=[name for name in names if name.startswith("cpu")],
        )
        self._closing.callback(self.supervisor.stop)
        # The workers are starting by now; numba's import and compilation here run beside theirs.
        self.team = self._make_team(say)
        self._closing.callback(self.team.stop)
        self.team.start()

    def _make_team(self, say: Say) -> "ThreadTeam | TorchTeam":
        model, plan, config = self.model, self.plan, self.plan.config
        team_config = TeamConfig(
            cores=plan.cores,
            context=plan.context,
            texts=plan.texts,
            cache_kind=plan.cache_kind,
            selector=plan.selector,
            look_ahead=plan.look_ahead,
            distances=self._distances,
            pinned=config.pin,
            balances=config.policy == "balance",
            captures=self.profiles or Source.LOWBIT in plan.selector.sources,
            device="cpu" if plan.attention == "host" else plan.attention,
        )
        if plan.attention != "cpu":
            with hold_interrupts():
                from warmfront.coordinator.decode.torch_team import TorchTeam

            return TorchTeam(model, self.board, self._dead, team_config)
        with hold_interrupts():
            from warmfront.coordinator.decode.forward import serve_team
            from warmfront.coordinator.decode.thread_team import ThreadTeam
            from warmfront.coordinator.selectors.lowbit import open_lowbit
            from warmfront.shared.kernels.jit import cache_is_cold, compiling_note

        if cache_is_cold(serve_team):
            say(compiling_note())
        if Source.LOWBIT in plan.selector.sources:
            self.lowbit = open_lowbit(model, config.bits, plan.recall, say)
            self._closing.callback(self.lowbit.file.close)
        return ThreadTeam(model, self.board, self._dead, team_config, self.lowbit)

    def _bytes_on_gpu(self) -> int:
        """Bytes that attention takes on a GPU."""
        if not self.plan.attention.startswith("cuda"):
            return 0
        from warmfront.coordinator.decode.torch_network import device_bytes

        return device_bytes(self.model, self.plan.positions, self.plan.cache_kind, self.plan.selector)

    def _wait(self, progress: Callable[[int, int], None]) -> None:
        """Until the workers and the team have loaded."""
        # The team first: it removes a damaged file, which a worker may then find gone.
        while not (self.team.ready() and self.supervisor.ready()):
            parts = (self.team.progress(), self.supervisor.loaded)
            progress(sum(done for done, _ in parts), sum(total for _, total in parts))
            time.sleep(_LOOK_S)

    def _assign(self, hellos: Mapping[str, Hello]) -> dict[str, Assignment]:
        """What each worker is to do; called by the supervisor once they have said Hello."""
        homes = self.ownership.assigned if hasattr(self, "ownership") else {}
        home = {name: homes.get(name, self._home) for name in hellos}
        return make_assignments(self.model, self.plan, home, self._distances, hellos, self._attention_bytes)

    def _open_ownership(self, say: Say, progress: Callable[[int, int], None]) -> None:
        """Give the GPU what it begins with."""
        from warmfront.coordinator.balancing.ownership import Ownership
        from warmfront.coordinator.balancing.policies import make_policy

        # Attention has its memory by now: a GPU worker that starts again finds what is left.
        self._attention_bytes = 0
        layout, names = self.model.layout, list(self.supervisor.hellos)
        expected = expected_bytes(self.model, self.plan.selector)
        self._use_bytes = use_bytes(self.model, self.plan.selector)
        self.ownership = Ownership(
            board=self.board,
            layout=layout,
            bounds=bounds_of(self.model.spec),
            home=self._home,
            names=names,
            predicted=self.plan.selector.masked or self.board.sizes.branches > 1,
            # A single worker shares with nobody.
            policy=make_policy(self.plan.config.policy if len(names) > 1 else "static", expected, layout.group_bytes),
            supervisor=self.supervisor,
            present=self.team.present,
            dead=self._dead,
            say=say,
        )
        for worker, name in enumerate(names):
            if name.startswith("gpu"):
                wanted = self._first_on_gpu(expected, self.supervisor.readies[name].slots)
                self.ownership.fill(worker, wanted, progress)

    def _first_on_gpu(self, expected: npt.NDArray[np.float64], slots: int) -> npt.NDArray[np.bool_]:
        """The groups [layers, groups] that a GPU of so many slots begins with: the plan's, else the most active, or
        whole layers."""
        file = self.plan.config.plan
        if file is None:
            by_layer = self.plan.config.policy == "by-layer"
            return whole_layers(expected.shape, slots) if by_layer else most_active(expected, slots)
        wanted = read_plan(Path(file), self.model)
        if (count := int(wanted.sum())) > slots:
            raise UsageError(
                f"the plan {file} gives the GPU {count} groups, it holds {slots}: "
                "pass the --vram-budget that the plan was made for"
            )
        return wanted

    def _forget(self) -> None:
        """Let go of the memory: the supervisor's callbacks make a cycle, which the collector may find much later."""
        for name in ("team", "board", "ownership"):
            self.__dict__.pop(name, None)

    def _lose(self, name: str) -> None:
        """A worker is dead: whoever waits for it is to look."""
        from warmfront.shared.wire.handoff import wake

        worker = self.plan.worker_names.index(name)
        self._dead[worker] = 1
        wake(address(self.board.done[worker]))

    def _abort(self) -> None:
        self.board.end()
        self._dead[:] = 1

    def run(
        self,
        tokens: list[int],
        places: Sequence[Place],
        want_logits: bool,
        *,
        decode: bool = False,
        compare_selection: bool = False,
        capture: bool = False,
        noted: bool = False,
        observed: Sequence[int] = (0,),
    ) -> None:
        """One job of `tokens` at `places`, with the moves of neurons before and after it; see `ThreadTeam.run`.

        Of a batch those of the numbers `observed` are taken for tokens of a text: see `observe`. `noted`: the CPU
        workers compute all of it, for a GPU notes nothing. Of a prompt's job the policy is told what it used.
        A job that a worker's death has ended is run again, once another process has its neurons.
        Raises what ended the workers. No Ctrl-C may leave it half done: hold interrupts.
        """
        self.team.check()
        self.supervisor.check()
        self.ownership.boundary()
        self.ownership.await_homes()
        owners = self.ownership.owners()
        noted |= self._places_by_firing and not decode
        if noted:
            self.ownership.hand_over(self.ownership.home)
        options = {"decode": decode, "compare_selection": compare_selection, "capture": capture}
        losses, uses = 0, self._uses(decode)
        while (result := self.team.run(tokens, places, want_logits, **options)) != 0:
            if result != LOST or not self.ownership.await_loss():
                self.supervisor.wait_for_error()
            losses += 1
            if losses == _LOSSES:
                raise WorkerError(f"a job was given up: {losses} times a worker died of it; see the output above")
            self.ownership.await_homes()
            uses = self._uses(decode)
        if noted:
            # A worker that was lost meanwhile holds nothing any more.
            self.ownership.hand_over(np.where(self.ownership.holds(owners), owners, self.ownership.home))
        if decode:
            for token in observed:
                self.observe(token)
            if self.plan.config.verify:
                self.ownership.verify(len(tokens))
        else:
            self._tell_prompt(len(tokens), self._uses(decode) - uses)

    def _uses(self, decode: bool) -> npt.NDArray[np.int64]:
        """How many tokens have used each branch [layers, branches], if that is asked for a prompt's job."""
        return np.zeros(0, np.int64) if decode else self.team.uses().copy()

    def _tell_prompt(self, tokens: int, uses: npt.NDArray[np.int64]) -> None:
        """The policy learns what a prompt's job used, as far as that is known: `uses` [layers, branches]."""
        if len(self.ownership.names) == 1:
            return
        if self.board.sizes.branches > 1:
            self.ownership.policy.read(load_by_choices(tokens, uses, bounds_of(self.model.spec), self._use_bytes))
        elif self._places_by_firing and tokens > 1:  # a single token is decoded, and not noted
            load = partial(load_of, self.model.layout, self.plan.selector)
            self.ownership.policy.read(load_by_firing(tokens, self.board.noted, load))

    def select(self, words: npt.NDArray[np.uint32] | None) -> None:
        """From now on decoded tokens compute these neurons, uint32 [layers, groups], beside those that are predicted;
        None: all."""
        if self.plan.selector.predicts:
            cast("ThreadTeam", self.team).admit(words)  # torch predicts without a core
        else:
            self.board.mask[:] = ALL_NEURONS if words is None else words

    def observe(self, token: int) -> None:
        """That many of the last batch is a token of a text: the balancer learns what it fired."""
        self.ownership.observe(token)

    @property
    def batch(self) -> int:
        """The most tokens of a batch."""
        return len(self.team.logits)

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Of the last job that wanted any: float32 [batch, vocab], each token of a batch's, else row 0; valid until the
        next."""
        return self.team.logits

    def spoiled(self) -> list[tuple[int, int]]:
        """See `ThreadTeam.spoiled`."""
        return self.team.spoiled()

    def scrub(self, table: npt.NDArray[np.int64], first: int, end: int) -> None:
        """See `KvCache.scrub`."""
        self.team.scrub(table, first, end)

    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """When what of the last job was done: see `ThreadTeam.times`."""
        return self.team.times()

    def captured(self, tokens: int) -> npt.NDArray[np.float32]:
        """The feed-forward inputs of the last job, run with `capture`: float32 [layers, tokens, hidden]."""
        return self.team.captured(tokens)

    def hidden(self, tokens: int) -> npt.NDArray[np.float32]:
        """What the head gets of each token, of the last job, a prompt's without logits: float32 [tokens, hidden]."""
        x, model = self.team.residual(tokens), self.model
        if "norm" not in model.entries:
            return x
        norm = model.spec.architecture.norm
        if norm.kind == "layer":
            x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(1, keepdims=True) + np.float32(norm.epsilon)) * model.floats("norm")
        return np.asarray(x + model.floats("norm.bias") if "norm.bias" in model.entries else x)

    def fired(self, tokens: int) -> npt.NDArray[np.bool_]:
        """Which neurons each token of the last job fired, if it profiles: bool [layers, tokens, neurons]."""
        return self.board.fires(tokens)

    def workers(self) -> Mapping[str, Hello]:
        """Those that have come up, in the order of the board."""
        return self.supervisor.hellos if hasattr(self, "supervisor") else {}

    def transfers(self) -> "Iterable[Transfer]":
        """The batches of groups that were copied to a worker, as far as they are remembered."""
        return self.ownership.transfers if hasattr(self, "ownership") else ()

    def close(self) -> None:
        """End what runs; may be called twice."""
        self._closing.close()
