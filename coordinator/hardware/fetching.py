"""How rows are best fetched on this machine: candidates race at the first start, and the winners are kept in one file.

{"<processor>, <cores> cores, kernels <digest>": {"scattered q8": [5120, 4], ...}, ...}

A start that cannot measure, or is not to, fetches as is usual; it never fails by that. The race is run behind the load,
when the run's kernels, which are most of its own, are compiled.
"""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from warmfront.shared.config import BITS
from warmfront.shared.errors import ResourceError
from warmfront.shared.files import locked, make_folder, write_whole
from warmfront.shared.kernels.fetching import (
    ANNOUNCED,
    BUNDLES,
    CACHED_TILES,
    GATE_ROWS,
    LOWBIT_ROWS,
    MATRIX_ROWS,
    SCATTERED,
    Distances,
    Fetch,
    Use,
    usual_distances,
)
from warmfront.shared.kernels.version import digest
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.machine.topology import read_processor
from warmfront.shared.model.formats import Kind
from warmfront.shared.paths import cache_root

if TYPE_CHECKING:  # it imports numba
    from warmfront.coordinator.hardware.fetching_race import Rates

__all__ = [
    "CANDIDATES",
    "choices_file",
    "distances_for",
    "every_use",
    "keep",
    "kept_choices",
    "kept_distances",
    "measure",
    "measure_again",
    "winner",
]

# The first of those that are equally fast is taken: rather nothing, and rather the shorter distance.
_AHEAD = tuple(Fetch(ahead) for ahead in (0, 2048, 5120, 16384))
CANDIDATES: dict[int, tuple[Fetch, ...]] = {
    MATRIX_ROWS: _AHEAD,
    CACHED_TILES: _AHEAD,
    LOWBIT_ROWS: _AHEAD,
    # The gates that follow, or not.
    GATE_ROWS: (Fetch(0), Fetch(2048)),
    BUNDLES: _AHEAD,
    SCATTERED: (*_AHEAD, Fetch(0, 4), Fetch(5120, 4)),
}
# By how much rates must differ to count: less is noise.
_NOISE = 1.02
# Machines and versions that are remembered.
_KEPT = 16
Say = Callable[[str], None]
Choices = dict[Use, Fetch]


def choices_file() -> Path:
    """The file of the choices."""
    return cache_root() / "fetching.json"


def every_use() -> list[Use]:
    """All ways of reading rows that a model can have."""
    plain = [int(kind) for kind in Kind if kind != Kind.Q4C]  # down rows only, which go with their gates
    kinds = {LOWBIT_ROWS: BITS, CACHED_TILES: (int(Kind.F32), int(Kind.F16), int(Kind.Q8))}
    return [Use(access, kind) for access in CANDIDATES for kind in kinds.get(access, plain)]


def winner(rates: "Rates", incumbent: Fetch | None = None) -> Fetch:
    """The first candidate that none is faster than by more than 2 %; before all others the `incumbent`, if any.

    Of those that raced to the end, by the medians of each round's rates relative to their mean: a machine's bandwidth
    changes within seconds.
    """
    rounds = max(map(len, rates.values()))
    finalists = {fetch: several for fetch, several in rates.items() if len(several) == rounds}
    means = [statistics.fmean(round_) for round_ in zip(*finalists.values(), strict=True)]
    relative = {
        fetch: statistics.median(rate / mean for rate, mean in zip(several, means, strict=True))
        for fetch, several in finalists.items()
    }
    order = [incumbent, *relative] if incumbent in relative else relative
    return next(fetch for fetch in order if max(relative.values()) <= _NOISE * relative[fetch])


def _machine(cpus: Iterable[int]) -> str:
    cores = len(set(cpus))
    return f"{read_processor()}, {cores} core{'s' * (cores > 1)}, kernels {digest()}"


def _all_kept() -> dict[str, dict[str, list[int]]]:
    with contextlib.suppress(OSError, ValueError, RecursionError, ResourceError):
        kept = json.loads(choices_file().read_bytes())
        if isinstance(kept, dict):
            return kept
    return {}


def kept_choices(cpus: Iterable[int]) -> Choices:
    """What was chosen for these cpus; what is damaged, or no candidate any more, counts as not there."""
    kept, found = _all_kept().get(_machine(cpus)), {}
    for access, candidates in CANDIDATES.items():
        for kind in Kind:
            with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError):
                fetch = Fetch(*kept[str(Use(access, kind))])  # type: ignore[index]
                if fetch in candidates:
                    found[Use(access, int(kind))] = fetch
    return found


def kept_distances(cpus: Iterable[int]) -> Distances:
    """The table for a run on `cpus` as far as was ever measured."""
    return _table(kept_choices(cpus))


def keep(cpus: Iterable[int], choices: Choices) -> None:
    """Keep choices beside those that are there. Raises OSError if the cache cannot be written."""
    machine, everything = _machine(cpus), _all_kept()
    everything.pop(machine, None)  # to the end, which is kept longest
    everything[machine] = {str(use): list(fetch) for use, fetch in sorted(choices.items())}
    lasting = dict(list(everything.items())[-_KEPT:])
    make_folder(choices_file().parent)
    write_whole(choices_file(), (json.dumps(lasting, indent=1) + "\n").encode())


def measure(uses: Iterable[Use], cpus: Sequence[int]) -> "dict[Use, Rates]":
    """The rates of all candidates for `uses`, of a thread on each of `cpus`.

    Raises ResourceError where that cannot be measured.
    """
    with hold_interrupts():
        from warmfront.coordinator.hardware.fetching_race import race

    return race({use: CANDIDATES[use.access] for use in uses}, cpus)


def distances_for(uses: Iterable[Use], cpus: Sequence[int], say: Say) -> Distances:
    """The table for a run on `cpus` that reads in these ways: as kept, after a race for those that never raced here."""
    choices = kept_choices(cpus)
    if missing := [use for use in uses if use not in choices]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a cache that cannot be written: measured at each start
                stack.enter_context(locked(choices_file()))
            choices = kept_choices(cpus)  # another process may have been measuring
            if missing := [use for use in missing if use not in choices]:
                choices |= _measured(missing, cpus, say)
                with contextlib.suppress(OSError):
                    keep(cpus, choices)
    return _table(choices)


def measure_again(cpus: Sequence[int], say: Say) -> "dict[Use, tuple[Rates, Fetch]]":
    """Race for every use, keep the choices, and return them with the rates. Raises ResourceError as `measure`."""
    kept = kept_choices(cpus)
    measured = measure(every_use(), cpus)
    results = {use: (rates, winner(rates, kept.get(use, _usual(use)))) for use, rates in measured.items()}
    try:
        with locked(choices_file()):
            keep(cpus, {use: choice for use, (_, choice) in results.items()})
    except OSError as error:
        say(f"cannot keep what was found in {choices_file()}: {error.strerror}")
    return results


def _measured(uses: Sequence[Use], cpus: Sequence[int], say: Say) -> Choices:
    say("measuring how this memory is best read (first run only)")
    try:
        return {use: winner(rates, _usual(use)) for use, rates in measure(uses, cpus).items()}
    except ResourceError as error:
        say(f"how this memory is best read was not measured: {error}")
        return {}


def _usual(use: Use) -> Fetch:
    """What other machines chose, which only what is clearly faster replaces: neighbours disturb a race, too."""
    return Fetch(int(usual_distances()[use]))


def _table(choices: Choices) -> Distances:
    table = usual_distances()
    for use, fetch in choices.items():
        table[use] = fetch.ahead
        if use.access == SCATTERED:
            table[ANNOUNCED, use.kind] = fetch.announced
    return table
