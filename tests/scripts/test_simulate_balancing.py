"""The balancing simulator: its model of time, its traces, and what policies come to in it."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from warmfront.coordinator.balancing.interface import Rebalance
from warmfront.coordinator.balancing.policies import POLICIES

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_balancing.py"
SMALL = {"layers": 3, "groups": 64, "hidden": 1024}
TOPIC = 160  # tokens of one


class Simulator(NamedTuple):
    """The script and the modules behind it."""

    script: ModuleType
    devices: ModuleType
    replay: ModuleType
    traces: ModuleType


@pytest.fixture(scope="module")
def sim() -> Simulator:
    """All of it, imported as the script does."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import simulate_balancing
        from balancing_simulator import devices, replay, traces
    finally:
        sys.path.pop(0)
    return Simulator(simulate_balancing, devices, replay, traces)


@pytest.fixture(scope="module")
def topics(sim: Simulator) -> Any:
    """A trace of four topics."""
    return sim.traces.synthesize(topics=4, tokens=4 * TOPIC, **SMALL)


@pytest.fixture(scope="module")
def steady(sim: Simulator) -> Any:
    """A trace of one topic."""
    return sim.traces.synthesize(topics=1, tokens=480, **SMALL)


def device(sim: Simulator, **changes: Any) -> Any:
    """CPU and GPU 4 to 1, where feed-forward is most of the time."""
    fields = {"cpus": [[2e3, 0.2]], "gpu": [5e3, 0.05], "coordinator_ns": 1e5, "link_gbs": 20.0, "stolen_ns": 0.02}
    return sim.devices.Device(**{**fields, **changes})


def test_synthetic_neurons_fire_as_often_as_the_profile_says(sim: Simulator, topics: Any) -> None:
    assert topics.counts.shape == (4 * TOPIC, 3, 64)
    assert topics.counts.dtype == np.uint8
    assert topics.switches == [TOPIC, 2 * TOPIC, 3 * TOPIC]
    assert topics.profile.mean() / 32 == pytest.approx(0.1, rel=1e-3)
    np.testing.assert_allclose(topics.counts.mean(0), topics.profile, atol=1.0)
    # Groups come by rate, and topics differ in which of them fire.
    assert (np.diff(topics.profile, axis=1) <= 1e-9).all()
    by_topic = topics.counts.reshape(4, TOPIC, 3, 64).mean(1)
    assert (by_topic.max(0) > 3 * by_topic.min(0) + 1).mean() > 0.2


def test_a_steady_trace_is_as_the_power_law_wants(sim: Simulator, steady: Any) -> None:
    rates = np.sort(steady.profile, axis=1)[:, ::-1]
    assert rates[:, :13].sum() / rates.sum() == pytest.approx(0.8, abs=0.02)


def test_popcounts(sim: Simulator) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, (3, 4, 5), np.uint32)
    expected = [[[int(word).bit_count() for word in row] for row in layer] for layer in words]
    np.testing.assert_array_equal(sim.traces.popcounts(words), expected)


def test_static_time_is_the_slowest_worker_of_each_layer(sim: Simulator, steady: Any) -> None:
    machine = device(sim)
    result = sim.replay.simulate("static", steady, machine, 0.2)
    replay = sim.replay.Replay(steady, machine, [int(0.2 * 192)], ())
    replay.start(steady.profile, steady.profile)
    for token in (0, 17, 479):
        total = 1e5
        for layer in range(3):
            read = [0.0, 0.0]
            for group in range(64):
                read[replay.owner[layer, group]] += float(steady.counts[token, layer, group]) * 3 * 2048
            total += max(2e3 + 0.2 * read[0], 5e3 + 0.05 * read[1])
        assert result.seconds[token] == pytest.approx(total / 1e9)
    assert result.moves == result.flips == result.stall_s == 0


def test_no_split_of_the_slots_by_frequency_beats_the_oracle(sim: Simulator, topics: Any) -> None:
    machine = device(sim)
    speed = {name: -sum(sim.replay.simulate(name, topics, machine, 0.15).seconds) for name in ("static", "random")}
    oracle = -sum(sim.replay.simulate("oracle static", topics, machine, 0.15).seconds)
    assert oracle >= 1.001 * speed["static"] > 1.2 * speed["random"]


def test_copies_count_once_they_have_come(sim: Simulator, steady: Any) -> None:
    replay = sim.replay.Replay(steady, device(sim), [10], ())
    replay.start(steady.profile, steady.profile)
    empty = np.empty((0, 3), np.int64)
    replay.resident[1], replay.owner[:] = False, 0
    moves = np.array([[1, 0, group] for group in range(12)])
    decision = Rebalance(replay.owner, empty, moves)
    replay.begin(decision, 11, 0.0)
    assert replay.moves == 10
    done = 17_000 + 10 * 32 * 3 * 2048 / 20
    replay.land(done - 1)
    assert replay.in_flight.sum() == 10
    assert not replay.resident[1].any()
    replay.land(done)
    assert replay.resident[1, 0, :10].all()
    assert not replay.in_flight.any()


@pytest.mark.parametrize("vram", [0.1, 0.6])
@pytest.mark.parametrize("name", ["topics", "steady"])
def test_balance_is_never_behind_the_best_static_split(
    sim: Simulator, name: str, vram: float, request: pytest.FixtureRequest
) -> None:
    trace, machine = request.getfixturevalue(name), device(sim)
    speed = {
        policy: 1 / sum(sim.replay.simulate(policy, trace, machine, vram).seconds)
        for policy in ("balance", "oracle static", "ema", "random")
    }
    assert speed["balance"] > 0.985 * max(speed.values())


def test_balance_recovers_from_a_change_of_topic(sim: Simulator, topics: Any) -> None:
    result = sim.replay.simulate("balance", topics, device(sim), 0.15)
    assert max(sim.script.recoveries(result.hits, topics.switches)) <= 64
    assert result.unused <= 0.1 * result.moves
    assert np.mean(result.hits) > 1.03 * np.mean(sim.replay.simulate("oracle static", topics, device(sim), 0.15).hits)


def test_balance_rests_while_nothing_changes(sim: Simulator, steady: Any) -> None:
    settling = steady._replace(counts=steady.counts[:160])
    for vram in (0.1, 0.6):
        # The margin is learned at first; the same draws, so that the rest is what comes after.
        first, result = (sim.replay.simulate("balance", trace, device(sim), vram) for trace in (settling, steady))
        assert result.moves + result.flips - first.moves - first.flips < 0.01 * 3.2 * 192
    # In windows of 8 tokens, of which so small a model reads unevenly.
    assert np.mean(result.imbalance[8:]) < 1.2


def test_balance_follows_a_shift_of_the_load_and_back(sim: Simulator, steady: Any) -> None:
    result = sim.replay.simulate("balance", steady, device(sim), 0.9, shifts=[(160, 0, 2.0), (320, 0, 1.0)])
    before, during, after = (np.mean(result.hits[token - 60 : token]) for token in (160, 320, 480))
    assert during > before + 0.04
    assert after == pytest.approx(before, abs=0.04)
    for token, level in ((160, during), (320, after)):
        assert np.mean(result.hits[token + 48 : token + 64]) == pytest.approx(level, abs=0.025)


def test_homes_and_several_gpus(sim: Simulator, topics: Any) -> None:
    machine = device(sim, cpus=[[2e3, 0.2], [2e3, 0.4]])
    rates = {
        name: 1 / sum(sim.replay.simulate(name, topics, machine, 0.15, gpus=3).seconds)
        for name in ("balance", "static")
    }
    assert rates["balance"] > 1.05 * rates["static"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script with these arguments."""
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_a_recorded_trace(sim: Simulator, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fired = rng.integers(0, 1 << 32, (100, 2, 8), np.uint32)
    about = json.dumps({"name": "tiny", "hidden": 64, "ffn": 256, "row_bytes": 128, "switches": [5, 60]})
    np.savez(tmp_path / "a.npz", fired=fired, about=about)
    trace = sim.traces.load_trace(tmp_path / "a.npz", None)
    assert (trace.name, trace.row_bytes, trace.switches) == ("tiny", 128, [50])
    np.testing.assert_allclose(trace.profile, sim.traces.popcounts(fired[:10]).mean(0))
    assert len(trace.counts) == 90
    assert len(sim.traces.load_trace(tmp_path / "a.npz", tmp_path / "a.npz").counts) == 100


def test_the_command(tmp_path: Path) -> None:
    small = "topics=2,tokens=120,layers=2,groups=24,hidden=512"
    plot = tmp_path / "plot.png"
    done = run(
        "--synthetic", small, "--device", "rtx3080ti", "--vram", "0.2,0.5", "--shift", "60:0:2", "--plot", str(plot)
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert [entry["vram"] for entry in report["runs"]] == [0.2, 0.5]
    assert list(report["runs"][0]["policies"]) == [*POLICIES, "random", "oracle static"]
    assert all(row["tokens_per_s"] > 0 for row in report["runs"][0]["policies"].values())
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "h200"], "one of the arguments --trace --synthetic is required"),
        (["--synthetic", "topics=4,colour=1"], "--synthetic"),
        (["--synthetic", "tokens=10", "--device", "abacus"], "--device"),
        (["--synthetic", "tokens=10", "--vram", "2"], "--vram must be between 0 and 1"),
        (["--synthetic", "tokens=10", "--shift", "5:9:2"], "workers are 0 to 1"),
        (["--synthetic", "tokens=10", "--policies", "best"], "--policies must be of balance"),
        (["--trace", str(SCRIPT)], "is not a trace of firing neurons"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
