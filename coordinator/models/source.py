"""A model as its makers publish it, read tensor by tensor under the names of `tensors.py`.

Rows of q and k come in interleaved pair order: rows 2j and 2j + 1 of a head are the pair that RoPE turns with frequency
j. `down` comes transposed, [ffn, hidden]: row i is column i of W_down, the neuron's own.
The readers are `gguf/reader.py` and `hf/reader.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import BLOCK, Kind, finite, pack, row_bytes
from warmfront.shared.model.spec import ModelSpec

__all__ = [
    "IGNORE_OVERFLOW",
    "Source",
    "SourceTensor",
    "TokenizerFiles",
    "end_ids",
    "padded",
]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Weights widened at a time while packing: 64 MB of float32.
CHUNK = 1 << 24
# What overflows is found, and told by the tensor's name.
IGNORE_OVERFLOW = np.errstate(over="ignore", invalid="ignore")
# Special tokens that end a turn or a text whether or not the model's settings name them.
END_TOKENS = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
)


class SourceTensor(ABC):
    """One matrix [rows, cols] or vector [n] of the source, read when asked for.

    `label` names it in errors. `kind` is the weight type that keeps what the file has. `step`: rows can be read apart
    in multiples of it. Numbers that are not finite raise ModelError when they are read.
    """

    def __init__(self, label: str, shape: tuple[int, ...], kind: Kind, step: int = 1) -> None:
        self._label = label
        self.shape = shape
        self.kind = kind
        self._step = step

    @abstractmethod
    def _widen(self, start: int, stop: int) -> Floats:
        """Rows start..stop (multiples of the step) as float32."""

    def _pack(self, start: int, stop: int, kind: Kind) -> Bytes:
        """The same rows as packed rows; a reader whose blocks map exactly overrides this."""
        values = self._finite(start, stop)
        missing = padded(self.shape[1]) - self.shape[1]
        return pack(np.pad(values, ((0, 0), (0, missing))) if missing else values, kind)

    def _finite(self, start: int, stop: int) -> Floats:
        """What `_widen` gives, checked: rounding to bfloat16 would hide a NaN."""
        values = self._widen(start, stop)
        self.check_finite(bool(np.isfinite(values).all()), Kind.F32)
        return values

    def check_finite(self, good: bool, kind: Kind) -> None:
        """Raise ModelError, naming the tensor, unless its numbers were seen to be finite as `kind`."""
        if not good:
            large = (
                "" if kind == Kind.F32 else f", or weights too large for {kind.name.lower()}: --dtype f32 keeps those"
            )
            raise ModelError(f"{self._label} holds NaN or infinity{large}; if the file should not, fetch it again")

    @IGNORE_OVERFLOW
    def float32(self) -> Floats:
        """The whole tensor, dequantised."""
        return np.array(self._finite(0, self.shape[0]), np.float32)

    @IGNORE_OVERFLOW
    def packed(self, kind: Kind) -> Bytes:
        """The matrix as uint8 [rows, row_bytes(kind, padded(cols))], zeros in the columns added.

        It is made in pieces, so that it is never whole in float32.
        """
        rows, cols = self.shape
        out = np.empty((rows, row_bytes(kind, padded(cols))), np.uint8)
        rows_at_once = max(CHUNK // cols // self._step, 1) * self._step
        for start in range(0, rows, rows_at_once):
            stop = min(start + rows_at_once, rows)
            out[start:stop] = self._pack(start, stop, kind)
            self.check_finite(finite(out[start:stop], kind, padded(cols)), kind)
        return out

    def column_scales(self) -> npt.NDArray[np.float16]:
        """With kind Q4C: scale and minimum of each column, for every 32 rows: float16 [rows / 32, 2, cols]."""
        raise ValueError(f"tensors of kind {self.kind.name} have no column scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What text needs: a tokenizer.json and how prompts begin and answers end.

    Encode with `add_special_tokens=False` and put `bos_id` first if `add_bos`; generation stops at any of `eos_ids`.
    `eos_id` is the one that chat templates write.
    """

    json: str
    chat_template: str | None
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool


class Source(Protocol):
    """An open model. `tokenizer` is None if it came without one; `notes` say what was converted, a line each."""

    spec: ModelSpec
    tokenizer: TokenizerFiles | None
    notes: list[str]

    def names(self) -> Set[str]:
        """The names that `tensor` takes."""

    def tensor(self, name: str) -> SourceTensor:
        """The tensor of that name; raises KeyError if there is none."""


def padded(size: int) -> int:
    """`size` rounded up to a multiple of the 32 weights of a block."""
    return -(-size // BLOCK) * BLOCK


def end_ids(special: Iterable[tuple[int, str]], declared: Iterable[int | None]) -> tuple[int, ...]:
    """Ids at which generation stops: those declared and the known end tokens among the special ones (id, text)."""
    known = {number for number, text in special if text in END_TOKENS}
    return tuple(sorted(known | {number for number in declared if number is not None}))
