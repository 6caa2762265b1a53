"""Placements against brute force and against the exact solver.  pytest tests/coordinator/placement/test_solver.py"""

import itertools
import math
import sys

import numpy as np
import pytest

from warmfront.coordinator.placement.solver import DeviceCosts, Floats, Mask, layer_ns, solve, solve_exact
from warmfront.shared.errors import UsageError


def cost_by_hand(load: Floats, gpu: Mask, costs: DeviceCosts) -> float:
    """The definition, spelled out."""
    total = 0.0
    for bytes_of, on_gpu in zip(load.tolist(), gpu.tolist(), strict=True):
        cpu, device = costs.cpu_job_ns, costs.gpu_job_ns if any(on_gpu) else 0.0
        for size, there in zip(bytes_of, on_gpu, strict=True):
            if there:
                device += costs.gpu_byte_ns * size
            else:
                cpu += costs.cpu_byte_ns * size
        total += max(cpu, device)
    return total


def lawful(load: Floats, gpu: Mask, slots: int, costs: DeviceCosts) -> bool:
    """Whether a placement keeps to the slots and, in every layer, to the floor."""
    given = np.array(
        [sum(size for size, there in zip(*row, strict=True) if there) for row in zip(load, gpu, strict=True)]
    )
    paid_back = costs.gpu_job_ns + costs.gpu_byte_ns * given <= costs.cpu_byte_ns * given * (1 + 1e-9) + 1e-6
    return bool(gpu.sum() <= slots and (paid_back | ~gpu.any(1)).all())


def best_by_brute_force(load: Floats, slots: int, costs: DeviceCosts) -> float:
    layers, groups = load.shape
    choices = (np.array(bits).reshape(layers, groups) for bits in itertools.product((False, True), repeat=load.size))
    return min(cost_by_hand(load, gpu, costs) for gpu in choices if lawful(load, gpu, slots, costs))


def draw(rng: np.random.Generator, layers: int, groups: int) -> tuple[Floats, Floats, int, DeviceCosts]:
    """Firing by a power law, in every second case with all gates read; a GPU 0.8 to 50 times as fast."""
    firing = 32 * np.arange(1, groups + 1) ** -rng.uniform(0.3, 1.5) * rng.uniform(0.2, 1, (layers, 1))
    firing = rng.permuted(firing, axis=1)
    load = (rng.choice([0, 32 / 3]) + firing * rng.uniform(0.95, 1.05, firing.shape)) * 4096
    cpu_byte = 1 / rng.uniform(10, 60)
    job = rng.choice([0, 1, 1]) * rng.uniform(0, 0.7) * load.sum(1).mean() * cpu_byte
    costs = DeviceCosts(rng.uniform(0, 2e4), cpu_byte, job, cpu_byte / rng.uniform(0.8, 50))
    return firing, load, int(rng.integers(0, load.size + 1)), costs


def test_times_of_the_layers() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        layers, groups = (int(n) for n in rng.integers(1, 8, 2))
        _, load, _, costs = draw(rng, layers, groups)
        gpu = rng.random(load.shape) < rng.random()
        assert layer_ns(load, gpu, costs).sum() == pytest.approx(cost_by_hand(load, gpu, costs), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 8), (2, 5), (4, 2), (3, 3)])
def test_the_exact_solver_against_all_placements(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    for _ in range(12):
        firing, load, slots, costs = draw(rng, *shape)
        best = best_by_brute_force(load, slots, costs)
        gpu, bound = solve_exact(load, slots, costs, gap=0.0)
        assert gpu.dtype == np.bool_
        assert lawful(load, gpu, slots, costs)
        assert cost_by_hand(load, gpu, costs) == pytest.approx(best, rel=1e-6)
        assert bound == pytest.approx(best, rel=1e-5)
        greedy = solve(firing, load, slots, costs)
        assert lawful(load, greedy, slots, costs)
        assert cost_by_hand(load, greedy, costs) >= best * (1 - 1e-9)


def test_greedy_comes_close_to_the_exact_solver() -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        firing, load, slots, costs = draw(rng, int(rng.integers(1, 7)), int(rng.integers(8, 40)))
        greedy, (exact, bound) = solve(firing, load, slots, costs), solve_exact(load, slots, costs)
        for gpu in (greedy, exact):
            assert lawful(load, gpu, slots, costs)
        taken, best = cost_by_hand(load, greedy, costs), cost_by_hand(load, exact, costs)
        assert bound <= best * (1 + 1e-6)
        assert best * (1 - 1e-4) <= taken <= best * 1.02, (load.shape, slots, costs)


@pytest.mark.parametrize("slots", [0, 1, 5, 20, 59, 60])
def test_without_floor_and_balance_the_hottest_groups_of_all_layers(slots: int) -> None:
    """With a GPU that costs nothing, what counts is how much firing fits its memory."""
    rng = np.random.default_rng(slots)
    firing = rng.permutation(60).reshape(6, 10) + 1.0
    gpu = solve(firing, 100 * firing, slots, DeviceCosts(1000, 0.05, 0, 0))
    np.testing.assert_array_equal(gpu, firing > 60 - slots)


def test_firing_decides_where_the_load_does_not() -> None:
    firing = np.array([[1.0, 5.0, 3.0, 2.0]])
    gpu = solve(firing, np.full((1, 4), 1e6), 2, DeviceCosts(0, 0.05, 0, 0.001))
    assert gpu.tolist() == [[False, True, True, False]]


def test_no_more_than_evens_the_sides_out() -> None:
    """A GPU twice as fast as the CPU gets two thirds of the work, however many slots; none if its job does not pay."""
    load = np.full((2, 30), 1e5)
    for job, expected in ((0.0, 20), (1e9, 0)):
        gpu = solve(load, load, 60, DeviceCosts(0, 0.1, job, 0.05))
        assert gpu.sum(1).tolist() == [expected, expected]


def test_a_layer_gets_nothing_or_its_floor() -> None:
    """The ten hottest groups of a layer are its floor: the slots suffice for none, one or two of the layers."""
    load = np.tile(np.r_[np.full(10, 1e5), np.full(30, 9e4)], (3, 1))
    costs = DeviceCosts(0, 0.1, 0.09e6, 0.01)
    assert costs.floor_bytes == pytest.approx(1e6)
    costs = costs._replace(gpu_job_ns=0.0899e6)
    for slots, expected in ((9, [0, 0, 0]), (10, [0, 0, 10]), (15, [0, 0, 15]), (25, [0, 10, 15])):
        counts = sorted(int(n) for n in solve(load, load, slots, costs).sum(1))
        assert counts == expected


def test_a_slower_gpu_gets_nothing() -> None:
    costs = DeviceCosts(0, 0.05, 0, 0.06)
    assert math.isinf(costs.floor_bytes)
    load = np.full((2, 10), 1e5)
    assert not solve(load, load, 20, costs).any()
    exact, bound = solve_exact(load, 20, costs)
    assert not exact.any()
    assert bound == pytest.approx(2 * 10 * 1e5 * 0.05)


def test_neurons_that_never_fire_stay_where_they_are() -> None:
    load = np.array([[0.0, 7e5, 0.0, 2e5], [0.0, 0.0, 0.0, 0.0]])
    assert solve(load, load, 8, DeviceCosts(10, 0.05, 10, 0.0001)).tolist() == (load > 0).tolist()


def test_the_same_placement_each_time() -> None:
    firing, load, slots, costs = draw(np.random.default_rng(3), 8, 64)
    first = solve(firing, load, slots, costs)
    assert all((solve(firing.copy(), load.copy(), slots, costs) == first).all() for _ in range(3))


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"^the exact solver needs scipy: run \S+ -m pip install scipy$"):
        solve_exact(np.ones((1, 1)), 1, DeviceCosts(1, 1, 1, 1))
