"""Which groups of neurons a GPU should compute, from how often they fire and how fast each side is.

A layer takes as long as the slower side, since both compute it at the same time:

    t_cpu = cpu_job + cpu_byte * bytes left to the CPU
    t_gpu = gpu_job + gpu_byte * bytes given to the GPU, or nothing without a group

and a token the sum over the layers of max(t_cpu, t_gpu), which is minimised over all placements that fit the GPU's
slots. In every layer the GPU gets either nothing or enough that its job pays, `gpu_job + gpu_byte * bytes <=
cpu_byte * bytes`: the floor of PowerInfer (Song et al., SOSP 2024, section 6.3). Prefill does not count: it is dense.

All groups have the same size, so a group's load alone says what its GPU memory is worth.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.extras import require
from warmfront.shared.errors import ResourceError

__all__ = ["DeviceCosts", "ExactPlacement", "Floats", "Mask", "layer_ns", "solve", "solve_exact"]

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
# After this long the exact solver returns the best that it has found.
_SOLVER_S = 120.0


class DeviceCosts(NamedTuple):
    """What single-token jobs of one layer cost on either side."""

    cpu_job_ns: float  # of all CPU workers together
    cpu_byte_ns: float  # per byte of weights read
    gpu_job_ns: float
    gpu_byte_ns: float

    @property
    def floor_bytes(self) -> float:
        """Bytes that the GPU has to read in a layer for its job to pay; infinite if it reads no faster than the CPU."""
        saved_byte_ns = self.cpu_byte_ns - self.gpu_byte_ns
        return self.gpu_job_ns / saved_byte_ns if saved_byte_ns > 0 else float("inf")


class ExactPlacement(NamedTuple):
    """What the exact solver found."""

    gpu: Mask  # bool [layers, groups]: the best placement found
    bound_ns: float  # of a token: no placement is faster


def layer_ns(load: Floats, gpu: Mask, costs: DeviceCosts) -> Floats:
    """ns of each layer, float64 [layers], if the groups of `gpu`, bool [layers, groups], are the GPU's."""
    given = np.sum(load, axis=1, where=gpu)
    cpu = costs.cpu_job_ns + costs.cpu_byte_ns * (load.sum(1) - given)
    both: Floats = np.maximum(cpu, costs.gpu_job_ns + costs.gpu_byte_ns * given)
    return np.where(gpu.any(1), both, cpu)


def solve(firing: Floats, load: Floats, slots: int, costs: DeviceCosts) -> Mask:
    """The groups for the GPU, at most `slots`: bool [layers, groups].

    `load`: bytes that whoever computes the group reads per token; `firing`: neurons that fire per token, which decides
    between groups of the same load; float64 [layers, groups].

    Greedy. A layer's groups are taken in order of load: first, at once, as many as its floor asks for, then one by one
    as long as that evens the two sides out. Of all layers the step that saves the most time per slot comes first. A
    layer's steps never get better, so without floors no other choice in this order is better. With floors the slots
    may run out before a layer's first step: each such layer is tried at the head of all, too.
    """
    layers, groups = load.shape
    order = np.lexsort((-firing, -load))
    given = np.zeros((layers, groups + 1))  # bytes of the first n groups in order
    np.cumsum(np.take_along_axis(load, order, 1), axis=1, out=given[:, 1:])
    cpu = costs.cpu_job_ns + costs.cpu_byte_ns * (given[:, -1:] - given)
    cost = np.maximum(cpu, costs.gpu_job_ns + costs.gpu_byte_ns * given)
    cost[:, 0] = cpu[:, 0]  # without a group the GPU has no job
    pays = given >= costs.floor_bytes
    pays[:, 0] = False
    first = np.argmax(pays, axis=1)
    # Beyond the cheapest count the GPU is the slower side. Where nothing pays it is 0, and the layer has no steps.
    best = np.argmin(np.where(pays | (np.arange(groups + 1) == 0), cost, np.inf), axis=1)

    steps: list[tuple[float, int, int]] = []  # (minus the ns saved per slot, layer, count of groups after it)
    for layer in np.flatnonzero(best).tolist():
        counts = np.arange(first[layer], best[layer] + 1)
        before = np.concatenate(([0], counts[:-1]))
        saved = (cost[layer, before] - cost[layer, counts]) / (counts - before)
        # A step that saves more than the one before it cannot be taken earlier: it is ranked as that one.
        steps += zip((-np.minimum.accumulate(saved)).tolist(), [layer] * len(counts), counts.tolist(), strict=True)
    steps.sort()
    taken, left_out = _take(steps, layers, slots)
    tries = [taken, *(_take([(0, layer, int(first[layer])), *steps], layers, slots)[0] for layer in left_out)]
    counts = tries[int(np.argmin([cost[np.arange(layers), each].sum() for each in tries]))]
    gpu = np.zeros(load.shape, np.bool_)
    np.put_along_axis(gpu, order, np.arange(groups) < counts[:, None], 1)
    return gpu


def _take(steps: list[tuple[float, int, int]], layers: int, slots: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """How many groups each layer gets if the steps are taken in turn while they fit.

    Also the layers that get none because their first step, the floor, did not fit.
    """
    counts, left_out = np.zeros(layers, np.int64).tolist(), set()
    for _, layer, count in steps:
        if layer not in left_out and count > counts[layer]:
            if count - counts[layer] <= slots:
                slots -= count - counts[layer]
                counts[layer] = count
            elif not counts[layer]:
                left_out.add(layer)
    return np.array(counts), sorted(left_out)


def solve_exact(load: Floats, slots: int, costs: DeviceCosts, gap: float = 1e-4) -> ExactPlacement:
    """The best placement by the definition above, within a share of `gap`: a mixed integer linear program for HiGHS.

    One binary variable for each group, not one for the length of a layer's prefix: where the GPU is about to become the
    slower side, a group of less load may even the two sides out better than the next one in order.

    Raises UsageError without scipy, ResourceError if nothing is found in two minutes.
    """
    require("scipy", "the exact solver")
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, csr_array, eye_array, kron

    # Variables: whether each group is the GPU's, row by row; whether the GPU has any group of each layer; each layer's
    # time, in us so that it is not many orders of magnitude larger than the others.
    layers, groups = load.shape
    floor = costs.floor_bytes
    able = load.sum(1) >= floor  # layers that reach the floor at all: the others get no variable to set
    cells, each = layers * groups, eye_array(layers)
    bytes_of = csr_array(kron(each, np.ones((1, groups))).multiply(load.reshape(1, -1)))
    rows: list[list[Any]] = [
        [costs.cpu_byte_ns / 1e3 * bytes_of, None, each],  # a layer takes as long as the CPU
        [-costs.gpu_byte_ns / 1e3 * bytes_of, -costs.gpu_job_ns / 1e3 * each, each],  # and as the GPU
        [bytes_of, -(floor if able.any() else 0.0) * each, None],  # the floor
        [-eye_array(cells), kron(each, np.ones((groups, 1))), None],  # with a group, the layer has any
        [np.ones((1, cells)), None, csr_array((1, layers))],  # the slots
    ]
    cpu_alone = (costs.cpu_job_ns + costs.cpu_byte_ns * load.sum(1)) / 1e3
    lower = np.concatenate((cpu_alone, np.zeros(2 * layers + cells), [-np.inf]))
    upper = np.append(np.full(len(lower) - 1, np.inf), float(slots))
    highest = np.concatenate((np.repeat(able, groups), able, np.full(layers, np.inf)))
    found = milp(
        np.repeat([0.0, 1.0], [cells + layers, layers]),
        integrality=np.repeat([1, 0], [cells + layers, layers]),
        bounds=Bounds(0, highest),
        constraints=LinearConstraint(block_array(rows, format="csr"), lower, upper),
        options={"mip_rel_gap": gap, "time_limit": _SOLVER_S},
    )
    if found.x is None:
        raise ResourceError(f"the exact solver found no plan ({found.message}): leave --exact out")
    gpu = np.asarray(found.x[:cells] > 0.5).reshape(layers, groups)
    return ExactPlacement(gpu, found.mip_dual_bound * 1e3)
