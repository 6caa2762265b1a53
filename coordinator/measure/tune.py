"""`warmfront tune`: which numbers of workers, threads and spins decode a model fastest on this machine.

All settings take turns, so that whatever else the machine does meets all alike: a turn's rate counts relative to the
others' of the same round. First shapes (workers x threads x the coordinator's threads) are measured, and after every
stage the slower half goes (successive halving); then the spins of the winner. Engines stay loaded as far as memory
allows. An interruption keeps the best so far.
"""

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.hardware.settings import Setting, keep_setting, tuning_file
from warmfront.coordinator.measure.picture import write_picture
from warmfront.shared.config import EngineConfig
from warmfront.shared.machine.core_plan import plan_cores
from warmfront.shared.machine.topology import Topology, read_topology

__all__ = ["Race", "draw", "render", "shapes", "tune"]

Say = Callable[[str], None]

# Rounds of each stage; of the last one, between the last few, twice as many.
_ROUNDS = 12
# Settings between which the last stage decides.
_FINALISTS = 2
_TURN_S = 0.2
_PROMPT, _FEWEST, _MOST = 16, 8, 128
_SPINS = (0, 100, 2000)
_USUAL_SPINS = 100


def shapes(topology: Topology) -> list[Setting]:
    """Workers, threads and the coordinator's threads worth trying, with the usual spins.

    Threads: all that may be, one less (for the rest of the system), three quarters, half. Workers: one, one per node,
    twice that. The coordinator: as many threads as the workers, or half.
    """
    most = len(plan_cores(topology).cpus)
    nodes = len(topology.nodes)
    found = []
    for threads in sorted({most, most - 1, most * 3 // 4, most // 2} - {0}, reverse=True):
        for workers in sorted({1, nodes, 2 * nodes}):
            for team in sorted({threads, max(1, threads // 2)}, reverse=True):
                if workers <= threads and threads % workers == 0:
                    found.append(Setting(workers, threads, team, _USUAL_SPINS if threads > 1 else 0))
    return found


class Race:
    """What was measured: tok/s of every setting, and relative to the mean of all that ran the same round."""

    def __init__(self) -> None:
        self.rates: dict[Setting, list[float]] = {}
        self._relative: dict[Setting, list[float]] = {}
        self._field: list[Setting] = []

    def add(self, rates: dict[Setting, float]) -> None:
        """A round: tok/s of every setting that is still in the race."""
        mean, self._field = statistics.fmean(rates.values()), list(rates)
        for setting, rate in rates.items():
            self.rates.setdefault(setting, []).append(rate)
            self._relative.setdefault(setting, []).append(rate / mean)

    def best(self, count: int = 1) -> list[Setting]:
        """The `count` fastest of those of the last round, by the median over the rounds that they all ran."""
        rounds = min(len(self._relative[setting]) for setting in self._field)
        return sorted(self._field, key=lambda each: -statistics.median(self._relative[each][-rounds:]))[:count]


class _EngineCache:
    """Engines by setting; the one that was used longest ago goes when there is no room for another."""

    def __init__(self, load: Callable[[Setting], Engine]) -> None:
        self._load = load
        self._engines: OrderedDict[Setting, Engine] = OrderedDict()
        self._room = 1

    def get(self, setting: Setting) -> Engine:
        if setting not in self._engines:
            while len(self._engines) >= self._room:
                self._engines.popitem(last=False)[1].close()
            before = read_topology().available_bytes
            engine = self._engines[setting] = self._load(setting)
            # It takes its weights, caches of tokens and processes; half of what is free stays so.
            size = max(1 << 28, before - read_topology().available_bytes)
            self._room = len(self._engines) + read_topology().available_bytes // 2 // size
            engine.decode_ids(_prompt(engine), _FEWEST)
        self._engines.move_to_end(setting)
        return self._engines[setting]

    def drop(self, keep: Sequence[Setting]) -> None:
        """Close the engines of all other settings."""
        for setting in [each for each in self._engines if each not in keep]:
            self._engines.pop(setting).close()


def _prompt(engine: Engine) -> list[int]:
    return [(300 + 7 * i) % engine.model.spec.vocab for i in range(_PROMPT)]


def _rate(engine: Engine) -> float:
    """tok/s of one turn."""
    engine.reset()
    tokens = max(_FEWEST, min(_MOST, round(_TURN_S * engine.stats.decode_tps), engine.plan.context - _PROMPT - 1))
    engine.decode_ids(_prompt(engine), tokens)
    return engine.stats.decode_tps


def tune(
    model: str,
    overrides: dict[str, Any],
    exhaustive: bool,
    *,
    say: Say,
    progress: Callable[[str, int, int], None],
    remaining: Callable[[float, float], None],
) -> dict[str, Any]:
    """Measure and keep the best; the object that is printed. `exhaustive`: every setting runs every round.

    `remaining` gets the seconds that have passed, and those that are expected to come.

    Without a GPU, also where there is one: with it, the balancer finds each one's part as it runs.
    """
    overrides = overrides | {"gpu": "none", "attention": "cpu"}
    packed: list[Path] = []

    def load(setting: Setting) -> Engine:
        heard = say if not packed else lambda _message: None  # the first engine says what there is to say
        engine = Engine.load(model, say=heard, progress=progress, **overrides, **setting._asdict())
        packed[:] = [engine.model.path]
        return engine

    course, garage, started = Race(), _EngineCache(load), time.monotonic()
    interrupted = False
    try:
        for done, left in _race(course, garage, shapes(read_topology()), exhaustive):
            passed = time.monotonic() - started
            remaining(passed, passed / done * left)
    except KeyboardInterrupt:
        if not course.rates:
            raise
        interrupted = True
    finally:
        garage.drop([])
    best = course.best()[0]
    tok_s = statistics.median(course.rates[best])
    try:
        keep_setting(packed[0], best, tok_s)
    except OSError as error:
        say(f"cannot keep what was found in {tuning_file()}: {error.strerror}")
    rows = [_row(setting, rates) for setting, rates in course.rates.items()]
    return {
        "model": model,
        "dtype": EngineConfig(**overrides).dtype,
        "seconds": round(time.monotonic() - started, 1),
        "interrupted": interrupted,
        "best": best._asdict() | {"tok_s": round(tok_s, 2)},
        "file": str(tuning_file()),
        "rows": sorted(rows, key=lambda row: (-row["rounds"], -row["tok_s"])),
    }


def _race(course: Race, garage: _EngineCache, field: list[Setting], exhaustive: bool) -> Iterator[tuple[int, int]]:
    """Run all stages; yields turns done and turns to come, as far as can be told."""
    done, spun = 0, exhaustive
    if exhaustive:
        field = [spinning for setting in field for spinning in _spinning(setting)]
    while True:
        final = spun or len(field) <= _FINALISTS
        rounds = 2 * _ROUNDS if final else _ROUNDS
        later = 0 if spun else (len(_SPINS) if final else len(field) + len(_SPINS)) * 2 * _ROUNDS
        for turn in range(rounds):
            rates = {}
            # The order turns, so that none always runs behind the same.
            start = turn % len(field)
            for setting in field[start:] + field[:start]:
                rates[setting] = _rate(garage.get(setting))
                done += 1
                yield done, (rounds - turn) * len(field) - len(rates) + later
            course.add(rates)
        if spun:
            return
        spun = final
        field = _spinning(course.best()[0]) if final else course.best(max(_FINALISTS, len(field) // 2))
        garage.drop(field)


def _spinning(setting: Setting) -> list[Setting]:
    """The setting with all numbers of spins; a single thread waits at no barrier."""
    return [setting._replace(spins=spins) for spins in (_SPINS if setting.threads > 1 else (0,))]


def _row(setting: Setting, rates: Sequence[float]) -> dict[str, Any]:
    return setting._asdict() | {
        "rounds": len(rates),
        "tok_s": round(statistics.median(rates), 2),
        "range": [round(min(rates), 2), round(max(rates), 2)],
    }


def render(result: dict[str, Any]) -> Iterator[str]:
    """The table for people."""
    yield "workers  threads  coordinator   spins    tok/s   (range)            rounds"
    for row in result["rows"]:
        low, high = row["range"]
        yield (
            f"{row['workers']:7} {row['threads']:8} {row['coordinator_threads']:12} {row['spins']:7} "
            f"{row['tok_s']:8.1f}   {f'({low:.1f} to {high:.1f})':<18} {row['rounds']:6}"
        )
    best = Setting(*(result["best"][name] for name in Setting._fields))
    how = "interrupted: the best so far" if result["interrupted"] else "best"
    yield f"{how}: {best}, {result['best']['tok_s']:.1f} tok/s, after {result['seconds']:.0f} s"
    yield f"kept in {result['file']}; generate, chat and bench take it unless told --no-tuning"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a picture (`picture.py`): tok/s over the number of workers, a line for each number of threads."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for threads in sorted({row["threads"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["threads"] == threads]
        workers = sorted({row["workers"] for row in rows})
        best = [max((row for row in rows if row["workers"] == w), key=lambda row: row["tok_s"]) for w in workers]
        values = [row["tok_s"] for row in best]
        below = [row["tok_s"] - row["range"][0] for row in best]
        above = [row["range"][1] - row["tok_s"] for row in best]
        panel.errorbar(workers, values, [below, above], fmt="o-", capsize=3, label=f"{threads} threads in all")
    panel.set(xlabel="CPU workers", ylabel="tok/s", title=f"{result['model']}, {result['dtype']}")
    panel.set_ylim(bottom=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend()
    write_picture(figure, path)
