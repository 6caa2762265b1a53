"""Which neurons are computed for a decoded token, in three parts; names of selectors are read here and nowhere else.

    name      criterion: it counts if    source of the mask      work
    all       it is there                none                    every neuron whole
    exact     its gate (and up) fires    none                    all gates, then the rest of those that fire
    lowrank   the same                   each token, by fc1, fc2 the neurons of the mask
    lowbit    the same, or it weighs     each token, by copies   the neurons of the mask
              enough where no gate closes
    core      its text uses it most      each text               the neurons of the mask
    core|...  either                     both                    the neurons of either mask

A mask is on the board (`shared/wire/board.py`); workers do not know where it comes from.
"""

from dataclasses import dataclass
from enum import Enum, auto

from warmfront.shared.errors import UsageError

__all__ = [
    "ALL",
    "CORE",
    "CORE_LOWBIT",
    "CORE_LOWRANK",
    "EXACT",
    "LOWBIT",
    "LOWRANK",
    "SELECTORS",
    "Criterion",
    "Selector",
    "Source",
    "Work",
    "selector_of",
    "wished_selector",
]


class Criterion(Enum):
    """When a neuron counts."""

    EVERY = auto()
    # Its gate, or its up where there is no gate, and with dReLU both: see `activation.fires`.
    FIRES = auto()
    # It is one of those that the text's tokens have used most: see `coordinator/selectors/core.py`.
    LARGEST = auto()


class Source(Enum):
    """Who says which neurons are computed, if somebody does before the workers are asked."""

    # For each token: the model's low-rank predictors.
    LOWRANK = auto()
    # For each token: copies of the gates, and of the ups where no gate closes, of a few bits.
    LOWBIT = auto()
    # For each text: its core.
    CORE = auto()


class Work(Enum):
    """What a worker does with a group of neurons that it owns."""

    # Computes all of each.
    DENSE = auto()
    # Computes all gates, then the rest of the neurons that fire.
    GATES = auto()
    # Computes those of the mask on the board.
    MASK = auto()


@dataclass(frozen=True, slots=True)
class Selector:
    """How the neurons of decoded tokens are chosen; a prompt's are all computed."""

    name: str
    criterion: Criterion
    sources: frozenset[Source]
    work: Work

    @property
    def masked(self) -> bool:
        """Whether the workers read a mask on the board."""
        return self.work is Work.MASK

    @property
    def predicts(self) -> bool:
        """Whether the coordinator writes the mask anew for each token."""
        return not self.sources.isdisjoint((Source.LOWRANK, Source.LOWBIT))

    def skips(self, sparse: bool) -> bool:
        """Whether the rest of a neuron that does not fire is left out, in a model that is `sparse` or not."""
        return sparse and self.criterion is not Criterion.EVERY

    def __str__(self) -> str:
        return self.name


ALL = Selector("all", Criterion.EVERY, frozenset(), Work.DENSE)
EXACT = Selector("exact", Criterion.FIRES, frozenset(), Work.GATES)
LOWRANK = Selector("lowrank", Criterion.FIRES, frozenset({Source.LOWRANK}), Work.MASK)
LOWBIT = Selector("lowbit", Criterion.FIRES, frozenset({Source.LOWBIT}), Work.MASK)
CORE = Selector("core", Criterion.LARGEST, frozenset({Source.CORE}), Work.MASK)


def _union(first: Selector, second: Selector) -> Selector:
    """The neurons of either."""
    return Selector(f"{first}|{second}", first.criterion, first.sources | second.sources, Work.MASK)


CORE_LOWRANK, CORE_LOWBIT = _union(CORE, LOWRANK), _union(CORE, LOWBIT)
_NAMED = {each.name: each for each in (ALL, EXACT, LOWRANK, LOWBIT, CORE, CORE_LOWRANK, CORE_LOWBIT)}
_AUTO = "auto"
# What a user can wish for.
SELECTORS = (_AUTO, *_NAMED)


def selector_of(name: str) -> Selector:
    """The selector of that name. Raises UsageError if there is none."""
    if name not in _NAMED:
        raise UsageError(f"no selector {name!r}: use one of {', '.join(SELECTORS)}")
    return _NAMED[name]


def wished_selector(name: str) -> Selector | None:
    """The same for a user's wish, which may leave it to the model: None."""
    return None if name == _AUTO else selector_of(name)
