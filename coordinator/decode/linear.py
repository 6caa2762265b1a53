"""Norm and matrix product of the compiled pass, for one token and for panels of several."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.atomics import floats_at
from warmfront.shared.kernels.gemm import LANES, multiply_rows, prepare
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.rows import AHEAD_BYTES, dot, quantise, row_stride
from warmfront.shared.model.formats import Kind

__all__ = ["linear", "normalise", "ready"]

Floats = npt.NDArray[np.float32]
_Q8 = int(Kind.Q8)


@kernel
def normalise(weight_at: int, eps: Any, hidden: int, x: Floats, out: Floats, panels: int, lanes: int) -> None:
    """Root mean square norm of every token."""
    weight = carray(floats_at(weight_at), (hidden,))
    if lanes == 1:
        total = np.float32(0)
        for k in range(hidden):
            total += x[k] * x[k]
        factor = np.float32(1) / np.sqrt(total / np.float32(hidden) + eps)
        for k in range(hidden):
            out[k] = x[k] * factor * weight[k]
        return
    factors = np.empty(LANES, np.float32)
    for p in range(panels):
        panel = x[p * hidden * LANES : (p + 1) * hidden * LANES]
        result = out[p * hidden * LANES : (p + 1) * hidden * LANES]
        factors[:] = 0
        for k in range(hidden):
            for lane in range(LANES):
                factors[lane] += panel[k * LANES + lane] * panel[k * LANES + lane]
        for lane in range(LANES):
            factors[lane] = np.float32(1) / np.sqrt(factors[lane] / np.float32(hidden) + eps)
        for k in range(hidden):
            for lane in range(LANES):
                result[k * LANES + lane] = panel[k * LANES + lane] * factors[lane] * weight[k]


@kernel
def ready(kind: int, x_at: int, prepared_at: int, cols: int, panels: int, lanes: int) -> Any:
    """What `linear` wants to know of x [panels, cols, lanes] beside x itself, for one matrix or several of a kind."""
    if lanes == 1:
        return quantise(x_at, prepared_at, cols) if kind >= _Q8 else x_at
    return prepare(kind, x_at, prepared_at, cols, panels)


@kernel
def linear(
    kind: int,
    weights_at: int,
    bias_at: int,
    cols: int,
    low: int,
    high: int,
    x_at: int,
    ready_at: int,
    y_at: int,
    rows: int,
    panels: int,
    lanes: int,
    scratch_at: int,
) -> None:
    """Rows low..high of a packed matrix times x [panels, cols, lanes] into y [panels, rows, lanes].

    `ready_at`: what `ready` returned for x and this kind.
    """
    stride = row_stride(kind, cols)
    if lanes == 1:
        y = carray(floats_at(y_at), (rows,))
        for r in range(low, high):
            row_at = weights_at + r * stride
            y[r] = dot(kind, row_at, x_at, ready_at, cols, row_at + AHEAD_BYTES)
    else:
        for r in range(low, high, 8):
            y_row_at, y_step = y_at + r * LANES * 4, rows * LANES * 4
            multiply_rows(kind, weights_at + r * stride, stride, cols, ready_at, y_row_at, y_step, panels, scratch_at)
    if bias_at != 0:
        bias = carray(floats_at(bias_at), (rows,))
        y = carray(floats_at(y_at), (panels * rows * lanes,))
        for p in range(panels):
            for r in range(low, high):
                for lane in range(lanes):
                    y[(p * rows + r) * lanes + lane] += bias[r]
