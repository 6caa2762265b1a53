"""How rows are fetched: the race, its choices, and the file that keeps them.

Run: pytest tests/coordinator/hardware/test_fetching.py
"""

import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.hardware import fetching, fetching_race
from warmfront.coordinator.hardware.fetching import (
    CANDIDATES,
    choices_file,
    distances_for,
    every_use,
    keep,
    kept_choices,
    measure_again,
    winner,
)
from warmfront.coordinator.hardware.fetching_race import Rates, _Course
from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.fetching import (
    ACCESSES,
    ANNOUNCED,
    LOWBIT_ROWS,
    MATRIX_ROWS,
    SCATTERED,
    Fetch,
    Use,
    usual_distances,
)
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.formats import Kind

CPUS = sorted(os.sched_getaffinity(0))
USES = [Use(MATRIX_ROWS, int(Kind.F16)), Use(SCATTERED, int(Kind.Q8)), Use(LOWBIT_ROWS, 2)]
FASTEST = {use: CANDIDATES[use.access][-1] for use in USES}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Use]:
    """A machine on which the last candidate is the fastest: what was measured on it."""
    uses: list[Use] = []

    def measure(wanted: Iterable[Use], _cpus: Sequence[int]) -> Mapping[Use, Rates]:
        uses.extend(wanted := list(wanted))
        time.sleep(0.05)
        return {
            use: {f: [20.0 + 2 * (f == CANDIDATES[use.access][-1])] * 5 for f in CANDIDATES[use.access]}
            for use in wanted
        }

    monkeypatch.setattr(fetching, "measure", measure)
    return uses


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory to read: in the caches, and soon done."""
    monkeypatch.setattr(fetching_race, "_block_bytes", lambda cores: cores << 25)
    monkeypatch.setattr(fetching_race.race, "__defaults__", (2,))


def quiet(_line: str) -> None:
    pass


@pytest.mark.usefixtures("small")
def test_the_race_is_run_by_all_and_chooses_a_candidate() -> None:
    results = measure_again(CPUS, quiet)
    assert list(results) == every_use()
    for use, (rates, choice) in results.items():
        assert tuple(rates) == CANDIDATES[use.access]
        assert choice in rates
        assert all(1 <= len(several) <= 2 and min(several) > 0.01 for several in rates.values())
    assert kept_choices(CPUS) == {use: choice for use, (_, choice) in results.items()}
    assert sorted(os.sched_getaffinity(0)) == CPUS


@pytest.mark.usefixtures("small")
def test_measured_at_first_and_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    table = distances_for(USES, CPUS, said.append)
    assert said == ["measuring how this memory is best read (first run only)"]
    kept = kept_choices(CPUS)
    assert sorted(kept) == sorted(USES)
    for use, fetch in kept.items():
        assert fetch in CANDIDATES[use.access]
        assert table[use] == fetch.ahead
    assert table[ANNOUNCED, Kind.Q8] == kept[USES[1]].announced
    monkeypatch.setattr(fetching, "measure", None)
    assert (distances_for(USES, CPUS, said.append) == table).all()
    assert len(said) == 1


def test_only_what_is_new_is_measured(measured: list[Use]) -> None:
    assert distances_for(USES[:1], CPUS, quiet)[USES[0]] == 16384
    table = distances_for(USES, CPUS, quiet)
    assert measured == USES
    assert [table[use] for use in USES] == [FASTEST[use].ahead for use in USES]
    assert table[ANNOUNCED, Kind.Q8] == 4
    for use in USES:
        table[use] = usual_distances()[use]
    table[ANNOUNCED] = 0
    assert (table == usual_distances()).all()


def test_another_number_of_cores_or_version_is_measured_for_itself(
    measured: list[Use], monkeypatch: pytest.MonkeyPatch
) -> None:
    distances_for(USES, [0, 1], quiet)
    distances_for(USES, [0, 1, 1, 0], quiet)
    assert len(measured) == len(USES)
    distances_for(USES, [0], quiet)
    monkeypatch.setattr(fetching, "digest", lambda: "later")
    distances_for(USES, [0, 1], quiet)
    monkeypatch.setattr(fetching, "read_processor", lambda: "another")
    distances_for(USES, [0, 1], quiet)
    assert len(measured) == 4 * len(USES)
    assert len(json.loads(choices_file().read_text())) == 4


def test_few_machines_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in [*range(20), 6]:
        monkeypatch.setattr(fetching, "read_processor", lambda number=number: f"cpu {number}")
        keep(CPUS, FASTEST)
    assert [key.split(",")[0] for key in json.loads(choices_file().read_text())][-3:] == ["cpu 18", "cpu 19", "cpu 6"]
    assert len(json.loads(choices_file().read_text())) == 16


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "null",
        "[]",
        "\xff",
        '{"KEY": 3}',
        '{"KEY": []}',
        '{"KEY": {"matrix f16": 5120}}',
        '{"KEY": {"matrix f16": [1, 2, 3]}}',
        '{"KEY": {"matrix f16": [-5120, 0]}}',
        '{"KEY": {"matrix f16": [5121, 0]}}',
        '{"KEY": {"matrix f16": ["5120", 0]}}',
        '{"KEY": {"matrix f16": [[], {}]}}',
        '{"KEY": {"matrix f16": null, "sea": [0, 0]}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_replaced(damage: str, measured: list[Use]) -> None:
    distances_for(USES, CPUS, quiet)
    (key,) = json.loads(choices_file().read_text())
    choices_file().write_text(damage.replace("KEY", key), "latin-1")
    measured.clear()
    assert distances_for(USES, CPUS, quiet)[USES[0]] == 16384
    assert measured == USES
    measured.clear()
    assert kept_choices(CPUS) == FASTEST
    distances_for(USES, CPUS, quiet)
    assert measured == []


@pytest.mark.parametrize("place", ["/proc/self", "/dev/null"])
def test_a_cache_that_cannot_be_written_costs_time_only(
    place: str, measured: list[Use], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    for _ in range(2):
        assert distances_for(USES, CPUS, quiet)[USES[0]] == 16384
    assert measured == 2 * USES
    said: list[str] = []
    assert measure_again(CPUS, said.append)[USES[0]][1].ahead == 16384
    (line,) = said
    assert line.startswith("cannot keep what was found in ")


def test_first_starts_at_once_measure_once_and_harm_nothing(measured: list[Use]) -> None:
    threads = [threading.Thread(target=distances_for, args=([use], CPUS, quiet)) for use in 3 * USES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(measured) == sorted(USES)
    assert kept_choices(CPUS) == FASTEST


def test_what_cannot_be_measured_is_said_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    little = replace(read_topology(), memory_limit=64 << 20)
    monkeypatch.setattr(fetching_race, "read_topology", lambda: little)
    for cpus, why in ((CPUS, "64|67 MB"), ([4000], r"cannot run on cpus \[4000\]")):
        said: list[str] = []
        assert (distances_for(USES, cpus, said.append) == usual_distances()).all()
        assert len(said) == 2
        assert "was not measured: " in said[1]
        assert re.search(why, said[1])
        monkeypatch.setattr(fetching_race, "_block_bytes", lambda cores: cores << 25)
    assert kept_choices(CPUS) == {}


def test_a_thread_that_fails_ends_the_others(small: None) -> None:
    with pytest.raises(ResourceError, match=r"cannot run on cpus \[4000\]"):
        fetching_race.race({use: CANDIDATES[use.access] for use in USES}, [CPUS[0], 4000])


NONE, NEAR, FAR = Fetch(), Fetch(2048), Fetch(16384)


@pytest.mark.parametrize(
    ("rates", "incumbent", "choice"),
    [
        ({NONE: [10.0] * 5, NEAR: [10.19] * 5}, None, NONE),
        ({NONE: [10.0] * 5, NEAR: [10.3] * 5}, None, NEAR),
        ({NONE: [10.0] * 5, NEAR: [10.3] * 5, FAR: [10.4] * 5}, None, NEAR),
        ({NONE: [10.0] * 5, NEAR: [10.3] * 5, FAR: [10.6] * 5}, None, FAR),
        ({NONE: [10.0] * 5, NEAR: [10.3] * 5, FAR: [10.4] * 5}, NEAR, NEAR),
        ({NONE: [10.3] * 5, NEAR: [10.0] * 5}, NEAR, NONE),
        ({NONE: [10.1] * 5, NEAR: [10.0] * 5}, NEAR, NEAR),
        # A machine whose bandwidth falls by half, and a turn that something disturbed.
        ({NONE: [20.0, 18.0, 16.0, 12.0, 10.0], NEAR: [22.0, 19.8, 17.6, 13.2, 11.0]}, None, NEAR),
        ({NONE: [10.0] * 5, NEAR: [10.5, 10.5, 2.0, 10.5, 10.5]}, None, NEAR),
        ({NONE: [10.0] * 5, NEAR: [10.0, 10.0, 30.0, 10.0, 30.0]}, None, NONE),
        # One that dropped out, in rounds in which all was fast.
        ({NONE: [10.0] * 5, NEAR: [10.5] * 5, FAR: [30.0] * 2}, FAR, NEAR),
    ],
)
def test_winner(rates: dict[Fetch, list[float]], incumbent: Fetch | None, choice: Fetch) -> None:
    assert winner(rates, incumbent) == choice


@pytest.mark.parametrize(("near", "rounds"), [(9.0, [5, 5, 2]), (5.0, [3, 2, 2])])
def test_who_is_far_behind_drops_out(near: float, rounds: list[int]) -> None:
    """After two rounds in which it never was near; one that is left alone runs once more."""
    speeds = {NONE: 10.0, NEAR: near, FAR: 5.0}
    course = _Course({USES[0]: tuple(speeds)}, 1, 5)
    course.go_on()
    while course.turn is not None:
        course.done[0] = 9000, 9000 / speeds[course.turn[1]]
        course.go_on()
    rates = course.rates[USES[0]]
    assert [len(rates[fetch]) for fetch in speeds] == rounds
    assert winner(rates) == NONE


@pytest.mark.parametrize(("faster", "chosen"), [(1.01, 2048), (1.1, 0)])
def test_what_is_usual_stays_unless_another_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, faster: float, chosen: int
) -> None:
    use = Use(MATRIX_ROWS, int(Kind.Q4))
    rates = {use: {fetch: [10.0 if fetch.ahead else 10.0 * faster] * 5 for fetch in CANDIDATES[MATRIX_ROWS]}}
    monkeypatch.setattr(fetching, "measure", lambda uses, cpus: rates)
    assert distances_for([use], CPUS, quiet)[use] == chosen


def test_every_candidate_set_begins_with_nothing() -> None:
    """Which wins where nothing gains and nothing is usual."""
    assert set(CANDIDATES) == set(range(len(ACCESSES))) - {ANNOUNCED}
    assert all(several[0] == Fetch() and len(set(several)) == len(several) for several in CANDIDATES.values())


def test_memory_of_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the caches, no more than a quarter of what is free."""
    from warmfront.shared.machine.topology import Cache

    def block(free: int, cache: int, cores: int = 2) -> int:
        machine: Any = replace(read_topology(), memory_limit=free)
        monkeypatch.setattr(fetching_race, "read_topology", lambda: machine)
        monkeypatch.setattr(fetching_race, "read_caches", lambda: (Cache(1, 1 << 15, 99), Cache(3, cache, 1)))
        return fetching_race._block_bytes(cores)

    assert block(8 << 30, 32 << 20) == 1 << 28
    assert block(8 << 30, 480 << 20) == 960 << 20
    assert block(512 << 20, 32 << 20) == 128 << 20
    for free in (512 << 20, 100 << 20):
        with pytest.raises(ResourceError, match="the caches hold"):
            block(free, 256 << 20)
