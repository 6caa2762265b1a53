"""Matrices that GPTQ and AWQ have rounded: 4-bit numbers, and a scale and a zero for each group of inputs.

    w = (number - zero) * scale        of outputs n, inputs k in groups of g

    P.qweight  int32   GPTQ [k / 8, n]: inputs 8i .. 8i + 7 of an output, the first in the lowest bits
                       AWQ  [k, n / 8]: outputs 8i + 0, 2, 4, 6, 1, 3, 5, 7 of an input
    P.qzeros   int32   [k / g, n / 8]: outputs 8i .. 8i + 7, of AWQ in its order; GPTQ's first version has zero - 1
    P.scales   float16 [k / g, n]
    P.g_idx    int32   [k]: the group of each input, of GPTQ; only that of neighbours is read

Such numbers are not rounded again. Where all zeros are 8 they are Q4S, else Q4, whose minimum, -zero * scale, is
rounded to float16; of down, whose rows are inputs, they are Q4C.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.source import IGNORE_OVERFLOW, Order, SourceTensor
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import BLOCK, Kind, join_nibbles, join_q4

__all__ = ["FOUR_BITS", "METHODS", "FourBitTensor", "Grouped", "gather"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Stored = StoredTensor[str]

# What the type of a gathered matrix is called among those of a folder.
FOUR_BITS = "4 bits"
METHODS = ("gptq", "awq")
# Which output each number of an int32 is.
_TURNS = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_PARTS = {"qweight": ("I32", 4), "qzeros": ("I32", 4), "scales": ("F16", 2), "g_idx": ("I32", 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """The parts of one matrix [outputs, inputs], checked."""

    numbers: Stored
    zeros: Stored
    scales: Stored
    # Whether it is AWQ's.
    awq: bool
    # Added to the stored zeros; -1 of a zero is 15.
    plus: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        inputs = self.numbers.shape[0] * (1 if self.awq else 8)
        return self.scales.shape[1], inputs

    def read_zeros(self) -> Bytes:
        """[outputs, groups]."""
        return np.ascontiguousarray(((_apart(self.zeros, self.awq) + self.plus) & 15).T)

    def read_scales(self) -> Halves:
        """[outputs, groups]."""
        return np.ascontiguousarray(self.scales.rows().view(np.float16).T)

    def read_numbers(self) -> Bytes:
        """[outputs, inputs]."""
        if self.awq:
            return np.ascontiguousarray(_apart(self.numbers, True).T)
        words = np.ascontiguousarray(self.numbers.rows().view(np.uint32).T)
        return _nibbles(words)


def _nibbles(words: npt.NDArray[np.uint32]) -> Bytes:
    """The 8 numbers of each word, the lowest bits first: [rows, 8 * words]."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return (words[:, :, None] >> shifts & 15).astype(np.uint8).reshape(len(words), -1)


def _apart(stored: Stored, turns: bool) -> Bytes:
    """Numbers that lie 8 to a word along a row, in order."""
    numbers = _nibbles(stored.rows().view(np.uint32))
    return numbers.reshape(len(numbers), -1, 8)[:, :, np.argsort(_TURNS)].reshape(numbers.shape) if turns else numbers


def gather(stored: MutableMapping[str, Stored], settings: Fields) -> dict[str, Grouped]:
    """The matrices of `stored` that come in parts, by the names of whole ones, which are put in the parts' place.

    `settings`: config.json's quantization_config. Raises ModelError for what is not read, named.
    """
    awq = settings.text("quant_method") == "awq"
    version = settings.text("version", "gemm") if awq else settings.text("checkpoint_format", "gptq")
    known = ("gemm",) if awq else ("gptq", "gptq_v2")
    if version.lower() not in known:
        raise ModelError(f"{settings.path}: version {version} of {settings.text('quant_method')} is not supported")
    if (bits := settings.count("bits", 4)) != 4:
        raise ModelError(f"{settings.path}: weights of {bits} bits are not supported in folders; give a GGUF")
    made: dict[str, Grouped] = {}
    for name in [each for each in stored if each.endswith(".qweight")]:
        base = name.removesuffix("qweight")
        parts = {part: stored.pop(base + part, None) for part in _PARTS}
        made[f"{base}weight"] = grouped = _checked(base, parts, awq, int(version == "gptq"))
        numbers = grouped.numbers
        stored[f"{base}weight"] = StoredTensor(numbers.path, f"{base}weight", FOUR_BITS, grouped.shape, 0, 0)
    return made


def _checked(base: str, parts: dict[str, Stored | None], awq: bool, plus: int) -> Grouped:
    found = {part: stored for part, stored in parts.items() if stored is not None}
    for part, stored in found.items():
        kind, size = _PARTS[part]
        if stored.type != kind:
            raise ModelError(f"{stored.path}: tensor {stored.name} has type {stored.type} instead of {kind}")
        if not stored.shape or stored.nbytes != size * prod(stored.shape):
            raise ModelError(f"{stored.path}: tensor {stored.name} takes {stored.nbytes} bytes; the file is damaged")
    missing = next((part for part in ("qweight", "qzeros", "scales") if part not in found), None)
    if missing is not None:
        where = next(iter(found.values())).path
        raise ModelError(f"{where}: tensor {base}{missing} is missing; the model is incomplete")
    grouped = Grouped(
        numbers=found["qweight"], zeros=found["qzeros"], scales=found["scales"], awq=awq, plus=0 if awq else plus
    )
    path, shapes = grouped.numbers.path, [found[part].shape for part in ("qweight", "qzeros", "scales")]
    if any(len(shape) != 2 for shape in shapes):
        raise ModelError(f"{path}: {base}qweight and its scales are not matrices")
    outputs, inputs = grouped.shape
    groups = shapes[2][0]
    size = inputs // max(groups, 1)
    width = outputs // 8 if awq else outputs
    if shapes[0][1] != width or shapes[1] != (groups, outputs // 8) or groups * size != inputs or outputs % 8:
        raise ModelError(f"{path}: {base}qweight, qzeros and scales do not fit each other; the file is damaged")
    if size % BLOCK:
        raise ModelError(f"{path}: {base}qweight has groups of {size} inputs; multiples of {BLOCK} are supported")
    if "g_idx" in found:
        order = found["g_idx"].rows().reshape(-1).view(np.int32)
        if not np.array_equal(order, np.arange(inputs) // size):
            raise ModelError(
                f"{path}: {base}g_idx mixes the groups' inputs (desc_act), which is not supported; give a GGUF"
            )
    return grouped


class FourBitTensor(SourceTensor):
    """A matrix of such numbers; of `picked` rows, in `order` within heads, or `transposed`."""

    def __init__(
        self,
        name: str,
        grouped: Grouped,
        *,
        transposed: bool = False,
        order: Order | None = None,
        picked: Order | None = None,
    ) -> None:
        self._grouped, self._transposed, self._picked = grouped, transposed, picked
        (rows, cols), label = grouped.shape, f"{grouped.numbers.path}: tensor {name}"
        if transposed:
            super().__init__(label, (cols, rows), Kind.Q4C, step=BLOCK)
            return
        symmetric = bool((grouped.read_zeros() == 8).all())
        shape = (rows if picked is None else len(picked), cols)
        step = 1 if order is None else len(order)
        super().__init__(label, shape, Kind.Q4S if symmetric else Kind.Q4, step=step, order=order)

    def _parts(self, start: int, stop: int) -> tuple[Bytes, Bytes, Halves]:
        """Numbers, zeros and scales, spread over blocks, of the file's rows that are delivered as start..stop."""
        numbers, zeros, scales = (
            self._grouped.read_numbers(),
            self._grouped.read_zeros(),
            self._grouped.read_scales(),
        )
        rows = slice(start, stop) if self._picked is None else self._picked[start:stop]
        repeats = numbers.shape[1] // BLOCK // zeros.shape[1]
        return (
            self._ordered(numbers[rows]),
            self._ordered(np.repeat(zeros[rows], repeats, axis=1)),
            self._ordered(np.repeat(scales[rows], repeats, axis=1)),
        )

    def _widen(self, start: int, stop: int) -> Floats:
        if self._transposed:
            return np.ascontiguousarray(_widened(*self._parts(0, self.shape[1])).T[start:stop])
        return _widened(*self._parts(start, stop))

    def _pack(self, start: int, stop: int, kind: Kind) -> Bytes:
        if kind != self.kind:
            return super()._pack(start, stop, kind)
        if kind == Kind.Q4C:
            numbers = np.ascontiguousarray(self._grouped.read_numbers().T[start:stop])
            return join_nibbles(numbers.reshape(stop - start, -1, BLOCK))
        numbers, zeros, scales = self._parts(start, stop)
        blocks = numbers.reshape(len(numbers), -1, BLOCK)
        if kind == Kind.Q4S:
            return np.concatenate((join_nibbles(blocks), scales.view(np.uint8)), axis=1)
        return join_q4(blocks, scales, _minima(zeros, scales))

    @IGNORE_OVERFLOW
    def column_scales(self) -> Halves:
        _, zeros, scales = self._parts(0, self.shape[1])
        both = np.ascontiguousarray(np.stack((scales.T, _minima(zeros, scales).T), axis=1))
        self.check_finite(bool(np.isfinite(both).all()), self.kind)
        return both


def _minima(zeros: Bytes, scales: Halves) -> Halves:
    return (-zeros.astype(np.float32) * scales.astype(np.float32)).astype(np.float16)


def _widened(numbers: Bytes, zeros: Bytes, scales: Halves) -> Floats:
    blocks = numbers.reshape(len(numbers), -1, BLOCK).astype(np.float32) - zeros[:, :, None]
    return np.asarray((blocks * scales[:, :, None]).reshape(numbers.shape), np.float32)
