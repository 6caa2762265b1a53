"""A published model, read tensor by tensor under the names of `tensors.py`.

Rows of q and k come in interleaved pair order: rows 2j and 2j + 1 of a head are the pair that RoPE turns with frequency
j. `down` comes transposed, [ffn, hidden]: row i is column i of W_down, the neuron's own.
The readers are `gguf/reader.py` and `hf/reader.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Attention
from warmfront.shared.model.formats import BLOCK, Kind, finite, pack, row_bytes
from warmfront.shared.model.spec import ModelSpec

__all__ = [
    "END_TOKENS",
    "IGNORE_OVERFLOW",
    "Source",
    "SourceTensor",
    "TokenizerFiles",
    "end_ids",
    "grouped_rows",
    "head_order",
    "padded",
    "rows_at_once",
]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Order = npt.NDArray[np.int64]
T = TypeVar("T", bound=np.generic)

# Weights widened at a time while packing: 64 MB of float32.
CHUNK = 1 << 24
# Overflow is detected afterwards, and reported with the tensor's name.
IGNORE_OVERFLOW = np.errstate(over="ignore", invalid="ignore")
# Tokens that end a turn, a text or a piece of code, whether or not the model's settings list them: llama.cpp's.
END_TOKENS = frozenset(
    (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "</s>",
        "<eos>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    )
)
# Sets of tokens beside which another one ends only a part of an answer, as gpt-oss' reasoning.
_NO_END = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)


class SourceTensor(ABC):
    """One matrix [rows, cols] or vector [n] of the source, read on demand.

    Numbers that are not finite raise ModelError when they are read.
    """

    def __init__(
        self, label: str, shape: tuple[int, ...], kind: Kind, *, step: int = 1, order: Order | None = None
    ) -> None:
        """`label` names it in errors, `kind` keeps what the file has, rows can be read in multiples of `step`.

        `order`: the rows of each head (`head_order`), where the file has them in another.
        """
        assert order is None or step == len(order)
        self._order = order
        self._label = label
        self.shape = shape
        self.kind = kind
        self.step = step

    def _ordered(self, rows: npt.NDArray[T]) -> npt.NDArray[T]:
        """Rows of whole heads in the order that they are delivered in."""
        if self._order is None:
            return rows
        heads = rows.reshape(-1, len(self._order), *rows.shape[1:])
        return heads[:, self._order].reshape(rows.shape)

    @abstractmethod
    def _widen(self, start: int, stop: int) -> Floats:
        """Rows start..stop, multiples of the step, as float32."""

    def _pack(self, start: int, stop: int, kind: Kind) -> Bytes:
        """The same rows, packed; a reader whose blocks can be repacked without rounding overrides this."""
        values = self.widened(start, stop)
        missing = padded(self.shape[1]) - self.shape[1]
        return pack(np.pad(values, ((0, 0), (0, missing))) if missing else values, kind)

    def widened(self, start: int, stop: int) -> Floats:
        """Rows start..stop, multiples of the step, as float32, checked: rounding to bfloat16 could hide a NaN."""
        values = self._widen(start, stop)
        self.check_finite(bool(np.isfinite(values).all()), Kind.F32)
        return values

    def check_finite(self, good: bool, kind: Kind) -> None:
        """Raise ModelError, naming the tensor, if its numbers were not all finite (`good`) as `kind`."""
        if not good:
            large = (
                "" if kind == Kind.F32 else f", or weights too large for {kind.name.lower()}: --dtype f32 keeps those"
            )
            raise ModelError(f"{self._label} holds NaN or infinity{large}; if the file should not, fetch it again")

    @IGNORE_OVERFLOW
    def float32(self) -> Floats:
        """The whole tensor, dequantised."""
        return np.array(self.widened(0, self.shape[0]), np.float32)

    @IGNORE_OVERFLOW
    def packed(self, kind: Kind, start: int = 0, stop: int | None = None) -> Bytes:
        """Rows start..stop (default: all), multiples of the step, as uint8 [rows, row_bytes(kind, padded(cols))].

        They are padded with zero columns, and made in chunks, so that they are never in memory as float32 as a whole.
        """
        cols = self.shape[1]
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        out = np.empty((stop - start, row_bytes(kind, padded(cols))), np.uint8)
        at_once = rows_at_once(cols, self.step)
        for first in range(start, stop, at_once):
            last = min(first + at_once, stop)
            chunk = out[first - start : last - start]
            chunk[:] = self._pack(first, last, kind)
            self.check_finite(finite(chunk, kind, padded(cols)), kind)
        return out

    def column_scales(self) -> npt.NDArray[np.float16]:
        """Scales and minima of a Q4C matrix, whose blocks are columns of 32 rows: float16 [rows / 32, 2, cols]."""
        raise ValueError(f"tensors of kind {self.kind.name} have no column scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer, and how prompts begin and answers end. Text is encoded with `add_special_tokens=False`."""

    # The text of a tokenizer.json.
    json: str
    # By name: "default", and others such as "tool_use".
    chat_templates: Mapping[str, str]
    # Texts of tokens by the names that templates have for them, such as "eos_token".
    special_tokens: Mapping[str, str]
    bos_id: int | None
    # Generation stops at any of these.
    eos_ids: tuple[int, ...]
    # Whether a prompt begins with `bos_id`.
    add_bos: bool
    # A line for the user at every start.
    note: str | None = None


class Source(Protocol):
    """An open model."""

    spec: ModelSpec
    # None if the model has none.
    tokenizer: TokenizerFiles | None
    # Lines for the user: what was converted, and how.
    notes: list[str]
    # The activations that are plausible by the files: see `activations.py`.
    activations: tuple[str, ...]

    def names(self) -> Set[str]:
        """The names that `tensor` takes."""

    def tensor(self, name: str) -> SourceTensor:
        """The tensor of that name; raises KeyError if there is none."""


def head_order(head_dim: int, rotated: int) -> Order:
    """The rows of a head in the order of pairs; the file has the first numbers of all pairs before the second ones.

    `rotated`: how many numbers of a head RoPE turns, the first ones.
    """
    pairs = np.arange(rotated).reshape(2, -1).T.reshape(-1)
    return np.concatenate((pairs, np.arange(rotated, head_dim)))


def grouped_rows(attention: Attention, part: str) -> Order:
    """The rows of q, k or v in one matrix that has, for each head of keys, its queries, the key, the value."""
    rows = np.arange(attention.q_rows + 2 * attention.kv_rows).reshape(attention.kv_heads, -1, attention.head_dim)
    return {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}[part].reshape(-1)


def rows_at_once(cols: int, step: int) -> int:
    """How many rows of a matrix, a multiple of `step`, are widened at a time."""
    return max(CHUNK // cols // step, 1) * step


def padded(size: int) -> int:
    """`size` rounded up to a multiple of the 32 weights of a block."""
    return -(-size // BLOCK) * BLOCK


def end_ids(tokens: Iterable[tuple[int, str]], declared: Iterable[int | None]) -> tuple[int, ...]:
    """Ids at which generation stops: those `declared`, and known end tokens among `tokens` (id, text)."""
    known = {text: number for number, text in tokens if text in END_TOKENS}
    for beside, text in _NO_END:
        if beside <= known.keys():
            known.pop(text, None)
    return tuple(sorted({*known.values(), *(number for number in declared if number is not None)}))
