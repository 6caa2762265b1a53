"""What a balancing policy is told and what it answers: all that is needed to write another one.

The world. A model has L layers of G groups of 32 neurons. W workers compute them: first the CPU workers ("homes"), then
the GPU workers ("caches"). Every group has exactly one home, which holds its full copy; caches hold further copies in
their slots. The *owner* of a group computes it, and always holds a copy of it. Changing the owner to another holder is
free: a table is written. A new copy costs a transfer of `transfer_ns`, which runs beside the computing, and takes a
free slot. A layer takes as long as its slowest worker, each of which takes `job_ns + byte_ns * bytes read`.

A policy is a state machine without I/O, threads or clock. The engine calls, from one thread:

    read(prompt)                  after a job of a prompt's tokens, where it is known what they used: which experts they
                                  chose; which neurons fired only for the policy `prompt`
    observe(used)                 after a decoded token: after every `stride`-th
    decide(state) -> Rebalance    between two tokens, once `interval` tokens have been decoded since the last call

What both are told is valid during the call, for it is the engine's own, and not to be changed. What `decide` may rely
on: shapes never change in a run; every owner is among the holders. What may have happened since its last decision:
copies that it began have come, and are `resident` now and owned by their worker; fewer than it asked for were begun; a
GPU worker died (its copies and slots are gone, its groups are owned by their homes) or came back (its old copies are in
flight again).

What it must return: an owner for every group that holds a complete copy of it after the drops; drops of complete copies
in caches, each once; moves of groups that are not in flight, each once, to a worker that does not hold it, and to a
cache only what no cache holds. What it need not care about: moves beyond `copy_budget` or beyond their worker's free
slots (those that the drops free included) are left out by the engine, the last ones first. A copy that comes to another
home makes that worker the group's home, and the old home's copy goes.

To add a policy: write the class, constructed as `PolicyClass` says, add it to `policies.py` and its name to POLICIES in
`shared/config.py`. tests/coordinator/balancing/test_policies.py then holds it to these rules, and
`scripts/simulate_balancing.py --policies NAME,balance` compares it.
"""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.bundle import GROUP

__all__ = [
    "BATCH",
    "BalancerState",
    "Bools",
    "Floats",
    "Ints",
    "Masks",
    "Owners",
    "Policy",
    "PolicyClass",
    "PromptLoad",
    "Reals",
    "Rebalance",
    "Used",
    "copy_budget",
    "make_rebalance",
]

Owners = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Reals = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Masks = npt.NDArray[np.uint32]
# Groups that are copied at one request: enough to read neighbours of the file at once, few enough to arrive soon.
BATCH = 16
# Part of the time that copies may take: they share the memory's bandwidth with the decoding.
_COPY_SHARE = 0.25


class Used(NamedTuple):
    """What a token used, as the board has it: a word for each group, bit i = neuron i."""

    asked: Masks  # [L, G]: the neurons that were to be computed, all of them where nothing predicts them
    computed: Masks  # [L, G]: those that were computed whole; counts where `asked` has bits
    uses: npt.NDArray[np.uint8]  # [L, B]: 0 for branches (`shared/model/branches.py`) that the token does not use
    bounds: Ints  # [B + 1]: where each branch's groups begin, and G
    gate_bytes: int  # that are read of each neuron asked for
    rest_bytes: int  # and of each computed whole

    def bytes_read(self) -> Reals:
        """Bytes that were read of each group [L, G]."""
        whole = np.bitwise_count(self.computed & self.asked)
        return np.asarray(np.bitwise_count(self.asked) * float(self.gate_bytes) + whole * float(self.rest_bytes))

    def active(self) -> Reals:
        """Share of each group's neurons that were computed whole [L, G]."""
        return np.asarray(np.bitwise_count(self.computed & self.asked) / GROUP)


class PromptLoad(NamedTuple):
    """What the tokens of a prompt's job used."""

    tokens: int
    # [L, G]: bytes that one of them would have read on average, had it been decoded. Exact, but for experts of which a
    # token computes only some neurons: of these it is the uses times what the profile expects of one.
    bytes_read: Floats


class BalancerState(NamedTuple):
    """What is true between two tokens."""

    owner: Owners  # [L, G]: the worker that computes each group
    home: Owners  # [L, G]: the worker that keeps its full copy
    resident: Bools  # [W, L, G]: complete copies
    in_flight: Bools  # [W, L, G]: copies that have begun and are not complete
    free_slots: Ints  # [W]: slots that neither hold a copy nor await one
    is_home: Bools  # [W]: true for CPU workers, which come first
    costs: Floats  # [W, 2]: ns per job, ns per byte read, as fitted to the load reports
    transfer_ns: float  # of copying one group, as measured
    copy_budget: int  # groups whose copying may begin now
    copies_late: bool  # copies that an earlier decision began are not complete
    decision_tokens: float = 0.0  # how many tokens' time a decision takes, as measured
    observation_tokens: float = 0.0  # and an observation


class Rebalance(NamedTuple):
    """What is to happen before the next token, in this order."""

    owner: Owners  # [L, G]: a worker with a complete copy, everywhere
    drops: Ints  # [n, 3] of (worker, layer, group): copies in caches to give up, whose worker does not own the group
    moves: Ints  # [m, 3] of (worker, layer, group): copies to begin, best first


class Policy(Protocol):
    """Decides who computes what."""

    name: str  # as in `--policy`
    interval: int  # tokens between decisions; may change with every decision
    stride: int  # tokens between observations, likewise

    def read(self, prompt: PromptLoad) -> None:
        """Learn from what a prompt's tokens used."""

    def observe(self, used: Used) -> None:
        """Learn from what a token used."""

    def decide(self, state: BalancerState) -> Rebalance:
        """The changes to make now."""


class PolicyClass(Protocol):
    """How every policy is made."""

    name: str

    def __call__(self, long_run: Floats, group_bytes: int) -> Policy:
        """`long_run` [L, G]: bytes that a token is expected to read, by the model's profile; bytes of one copy."""


def copy_budget(until_next_ns: float, transfer_ns: float, in_flight: int) -> int:
    """Groups whose copying may begin if the next decision is `until_next_ns` away, `in_flight` being under way.

    A batch at least: with tokens shorter than a transfer nothing would ever move.
    """
    return max(0, max(BATCH, int(_COPY_SHARE * until_next_ns / transfer_ns)) - in_flight)


def make_rebalance(owner: Owners, home: Owners, drops: list[Ints], moves: list[Ints]) -> Rebalance:
    """The decision with these drops and moves ([n, 3] each); a dropped group that its worker owned goes `home`."""
    dropped, moved = (np.concatenate([np.empty((0, 3), np.int64), *parts]) for parts in (drops, moves))
    worker, layer, group = dropped.T
    orphaned = owner[layer, group] == worker
    owner[layer[orphaned], group[orphaned]] = home[layer[orphaned], group[orphaned]]
    return Rebalance(owner, dropped, moved)
