"""The race of `tune` over made-up engines: who stays in it, who wins, what an interruption leaves."""

import dataclasses
import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from warmfront.coordinator.hardware.settings import Setting, kept_setting
from warmfront.coordinator.measure import tune as module
from warmfront.coordinator.measure.tune import Race, render, shapes, tune
from warmfront.shared.machine.topology import Node, Topology

PACKED = "/models/made-up-f16-00.safetensors"


def machine(*cores: int) -> Topology:
    """A machine with so many cores per node."""
    counter = itertools.count()
    return Topology(
        tuple(
            Node(number, tuple((next(counter),) for _ in range(count)), 1 << 34, 1 << 34)
            for number, count in enumerate(cores)
        )
    )


class FakeEngine:
    """Decodes at the speed that `speed` gives a setting, times the machine's mood of the moment."""

    loaded = 0
    turns: list[Setting]

    def __init__(self, setting: Setting, speed: dict[Setting, float], noise: random.Random) -> None:
        self._setting, self._speed, self._noise = setting, speed, noise
        self.model = SimpleNamespace(path=Path(PACKED), spec=SimpleNamespace(vocab=100))
        self.plan = SimpleNamespace(context=4096)
        self.stats = SimpleNamespace(decode_tps=50.0)
        FakeEngine.loaded += 1

    def reset(self) -> None:
        pass

    def decode_ids(self, ids: list[int], count: int) -> list[int]:
        FakeEngine.turns.append(self._setting)
        if len(FakeEngine.turns) == limit["turns"]:
            raise KeyboardInterrupt
        # All meet the same slow drift of the machine, and some noise of their own.
        drift = 1 + 0.2 * (len(FakeEngine.turns) % 60) / 60
        self.stats.decode_tps = self._speed[self._setting] * drift * self._noise.uniform(0.99, 1.01)
        return []

    def close(self) -> None:
        FakeEngine.loaded -= 1


limit = {"turns": 0}


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def race(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `tune` on a machine of four cores where `speed` gives tok/s; returns its result."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "read_topology", lambda: machine(4))
    FakeEngine.turns, FakeEngine.loaded, limit["turns"] = [], 0, 0

    def run(speed: Any, exhaustive: bool = False) -> dict[str, Any]:
        noise, table = random.Random(1), _Speeds(speed)

        def load(_model: str, say: Any, progress: Any, **wishes: Any) -> FakeEngine:
            # Also where there is a GPU.
            assert (wishes["gpu"], wishes["attention"]) == ("none", "cpu")
            return FakeEngine(Setting(**{name: wishes[name] for name in Setting._fields}), table, noise)

        monkeypatch.setattr(module, "Engine", SimpleNamespace(load=load))
        result = tune("made-up", {"dtype": "f16"}, exhaustive, say=print, progress=quiet, remaining=quiet)
        assert FakeEngine.loaded == 0, "every engine is closed"
        return result

    return run


class _Speeds(dict[Setting, float]):
    def __init__(self, speed: Any) -> None:
        self._speed = speed

    def __missing__(self, setting: Setting) -> float:
        return float(self._speed(setting))


def test_shapes_of_a_laptop_and_of_two_sockets() -> None:
    assert shapes(machine(2)) == [
        Setting(1, 2, 2, 100),
        Setting(1, 2, 1, 100),
        Setting(2, 2, 2, 100),
        Setting(2, 2, 1, 100),
        Setting(1, 1, 1, 0),
    ]
    assert shapes(machine(1)) == [Setting(1, 1, 1, 0)]
    several = shapes(machine(16, 16))
    assert len(set(several)) == len(several) < 30
    assert {each.workers for each in several} == {1, 2, 4}
    assert all(each.threads <= 32 and each.threads % each.workers == 0 for each in several)


def test_a_quota_bounds_the_threads() -> None:
    bounded = dataclasses.replace(machine(8), quota=2.5)
    assert {each.threads for each in shapes(bounded)} == {2, 1}


def test_the_fastest_wins_and_the_slow_go_early(race: Any) -> None:
    best = Setting(2, 4, 2, 2000)

    def speed(setting: Setting) -> float:
        off = sum(one != other for one, other in zip(setting, best, strict=True))
        return 100 / (1 + 0.1 * off)

    result = race(speed)
    assert Setting(*(result["best"][name] for name in Setting._fields)) == best
    assert kept_setting(Path(PACKED)) == best
    rounds = {Setting(*(row[name] for name in Setting._fields)): row["rounds"] for row in result["rows"]}
    assert rounds[best._replace(spins=100)] > min(rounds.values())
    assert len(FakeEngine.turns) < len(race(speed, exhaustive=True)["rows"]) * 12
    assert any(line.startswith("best: 2 x 2 threads, 2 of the coordinator, 2000 spins") for line in render(result))


def test_the_choice_is_near_the_best_of_an_exhaustive_search(race: Any) -> None:
    def speed(setting: Setting) -> float:
        return 100 + 37 * random.Random(repr(setting)).random()

    found, every = race(speed)["best"], race(speed, exhaustive=True)
    best = max(speed(Setting(*(row[name] for name in Setting._fields))) for row in every["rows"])
    assert speed(Setting(*(every["best"][name] for name in Setting._fields))) >= 0.97 * best
    # Without the other numbers of spins, the shapes' race itself is what is bounded.
    shaped = max(speed(setting) for setting in shapes(machine(4)))
    assert speed(Setting(*(found[name] for name in Setting._fields))) >= 0.97 * shaped


def test_an_interruption_keeps_the_best_so_far(race: Any) -> None:
    limit["turns"] = 40
    result = race(lambda setting: 100.0 * setting.threads / setting.workers)
    assert result["interrupted"]
    assert result["best"]["workers"] == 1
    assert result["best"]["threads"] == 4
    assert any(line.startswith("interrupted: the best so far: 1 x 4") for line in render(result))


def test_an_interruption_before_the_first_round_keeps_nothing(race: Any) -> None:
    limit["turns"] = 3
    with pytest.raises(KeyboardInterrupt):
        race(lambda setting: 1.0)
    assert FakeEngine.loaded == 0


def test_a_cache_that_cannot_be_written(
    race: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found is shown all the same."""

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(module, "keep_setting", refuse)
    assert race(lambda setting: 100.0 * setting.threads)["best"]["threads"] == 4
    assert "cannot keep what was found in " in capsys.readouterr().out


def test_rounds_of_different_length_compare_within_the_last_field() -> None:
    course, a, b, c = Race(), Setting(1, 1, 1, 0), Setting(1, 2, 2, 0), Setting(2, 2, 2, 0)
    course.add({a: 10, b: 20, c: 1})
    course.add({a: 11, b: 10})
    assert course.best(1) == [b]
    course.add({a: 11, b: 5})
    course.add({a: 11, b: 5})
    assert course.best(2) == [a, b]
