"""`warmfront tune --kernels`: how far ahead rows of weights are best fetched on this machine, measured and kept."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from warmfront.coordinator.hardware.bandwidth import Bandwidth
from warmfront.coordinator.hardware.fetching import choices_file, measure_again
from warmfront.shared.machine.core_plan import plan_cores
from warmfront.shared.machine.topology import read_processor, read_topology

__all__ = ["describe", "render"]

_ROUNDS = 3


def describe(say: Callable[[str], None]) -> dict[str, Any]:
    """The object that is printed: a row for each access and weight type; distances in bytes, rates in GB/s."""
    cpus, started = plan_cores(read_topology()).coordinator, time.monotonic()
    results = measure_again(cpus, say)
    seconds, meter = time.monotonic() - started, Bandwidth(cpus)
    rows = []
    for use, (rates, choice) in results.items():
        access, _, kind = str(use).partition(" ")
        measured = [
            fetch._asdict() | {"gb_s": round(statistics.median(several), 2)} for fetch, several in rates.items()
        ]
        rows.append({"access": access, "type": kind, **choice._asdict(), "measured": measured})
    return {
        "processor": read_processor(),
        "cores": len(set(cpus)),
        "bandwidth": round(max(meter.measure() for _ in range(_ROUNDS)), 2),
        "seconds": round(seconds, 1),
        "file": str(choices_file()),
        "rows": rows,
    }


def _name(fetch: dict[str, Any]) -> str:
    """ "5K", or where a line of each KB is fetched 4 neurons before, "5K+4"; "none"."""
    ahead = f"{fetch['ahead'] >> 10}K" if fetch["ahead"] else "none"
    return f"{ahead}+{fetch['announced']}" if fetch["announced"] else ahead


def render(facts: dict[str, Any]) -> Iterator[str]:
    """The table for people."""
    yield f"{facts['processor']}, {facts['cores']} cores, read bandwidth {facts['bandwidth']:.1f} GB/s"
    yield "rows              chosen   GB/s, fetched so far ahead (+4: announced four neurons earlier)"
    for row in facts["rows"]:
        rates = "  ".join(f"{_name(each):>6} {each['gb_s']:4.1f}" for each in row["measured"])
        yield f"{row['access'] + ' ' + row['type']:<17} {_name(row):<7} {rates}"
    yield f"measured in {facts['seconds']:.1f} s; kept in {facts['file']}, used by every run"
