"""GGUF files in parts, plain ones and PowerInfer's, and damage to their meaning."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from fuzzing.damage import ODD_FLOATS, ODD_INTS, ODD_TEXTS, damage_bytes, odd_number

__all__ = ["damage_gguf", "make_gguf"]

HIDDEN, FFN, VOCAB = 64, 96, 48
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
U32, F32, TEXT, ARRAY = 4, 6, 8, 9


@dataclass
class Field:
    """A key with its value, packed."""

    key: bytes
    kind: int
    raw: bytes

    def written(self) -> bytes:
        return _text(self.key) + struct.pack("<I", self.kind) + self.raw


@dataclass
class Tensor:
    """A tensor's entry and its bytes; `offset` in place of where they are."""

    name: bytes
    sizes: list[int]
    kind: int
    data: bytes
    offset: int | None = None

    def written(self, offset: int) -> bytes:
        head = _text(self.name) + struct.pack(f"<I{len(self.sizes)}Q", len(self.sizes), *self.sizes)
        return head + struct.pack("<IQ", self.kind, offset if self.offset is None else self.offset)


@dataclass
class Gguf:
    """A file in parts that can be damaged one by one; `counts` in place of how many tensors and fields there are."""

    fields: list[Field]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    counts: list[int] = field(default_factory=list)

    def written(self) -> bytes:
        counts = self.counts or [len(self.tensors), len(self.fields)]
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join(f.written() for f in self.fields)
        data = b""
        for tensor in self.tensors:
            head += tensor.written(len(data))
            data += tensor.data + bytes(-len(tensor.data) % 32)
        return head + bytes(-len(head) % 32) + data


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _array(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def make_gguf(rng: random.Random) -> Gguf:
    """An undamaged file of one layer."""
    kind = rng.choice([Type.F32, Type.F16, Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q5_0, Type.Q4_K, Type.Q6_K])
    hidden = ffn = 256 if kind in (Type.Q4_K, Type.Q6_K) else HIDDEN
    powerinfer = rng.random() < 0.3
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": hidden, "feed_forward_length": ffn}
    sizes |= {"attention.head_count": hidden // 16, "attention.head_count_kv": hidden // 32}
    fields = [
        Field(b"general.architecture", TEXT, _text(b"llama")),
        Field(b"general.alignment", U32, struct.pack("<I", 32)),
    ]
    fields += [Field(f"llama.{name}".encode(), U32, struct.pack("<I", size)) for name, size in sizes.items()]
    for name, value in (
        ("attention.layer_norm_rms_epsilon", 1e-5),
        ("rope.freq_base", 1e4),
        ("rope.scale_linear", 1.0),
    ):
        fields.append(Field(f"llama.{name}".encode(), F32, struct.pack("<f", value)))
    fields += _vocabulary(rng.random() < 0.5)
    attention = {"q": hidden, "k": hidden // 2, "v": hidden // 2, "output": hidden}
    shapes = {"token_embd": (VOCAB, hidden), "output_norm": (hidden,)}
    shapes |= {"blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,)}
    shapes |= {f"blk.0.attn_{part}": (rows, hidden) for part, rows in attention.items()}
    shapes |= {"blk.0.ffn_gate": (ffn, hidden), "blk.0.ffn_up": (ffn, hidden)}
    if powerinfer:
        shapes |= {"blk.0.ffn_down_t": (ffn, hidden), "blk.0.fc1": (hidden, hidden), "blk.0.fc2": (ffn, hidden)}
    else:
        shapes |= {"blk.0.ffn_down": (hidden, ffn)}
    tensors = [
        Tensor(
            f"{name}.weight".encode(), list(shape[::-1]), *_weights(rng, shape, kind if len(shape) > 1 else Type.F32)
        )
        for name, shape in shapes.items()
    ]
    return Gguf(fields, tensors, b"PWRI" if powerinfer else b"GGUF")


def _vocabulary(sentence_piece: bool) -> list[Field]:
    tokens = [b"<unk>", b"<s>", b"</s>", *(bytes([i]) for i in range(97, 123))]
    tokens += [b"w%d" % i for i in range(VOCAB - len(tokens))]
    fields = {
        b"model": (TEXT, _text(b"llama" if sentence_piece else b"gpt2")),
        b"tokens": (ARRAY, _array(TEXT, [_text(token) for token in tokens])),
        b"token_type": (ARRAY, _array(5, [struct.pack("<i", 3 if i < 3 else 1) for i in range(VOCAB)])),
        b"eos_token_id": (U32, struct.pack("<I", 2)),
        b"bos_token_id": (U32, struct.pack("<I", 1)),
        b"add_bos_token": (7, b"\1"),
    }
    if sentence_piece:
        fields[b"scores"] = (ARRAY, _array(F32, [struct.pack("<f", -i) for i in range(VOCAB)]))
    else:
        fields[b"merges"] = (ARRAY, _array(TEXT, []))
        fields[b"pre"] = (TEXT, _text(b"gpt-2"))
    made = [Field(b"tokenizer.ggml." + name, *value) for name, value in fields.items()]
    return [*made, Field(b"tokenizer.chat_template", TEXT, _text(b"{{ messages }}"))]


def _weights(rng: random.Random, shape: tuple[int, ...], kind: Type) -> tuple[int, bytes]:
    """The number of the type, and random weights of it."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape))
    if block == 1:
        values = np.frombuffer(rng.randbytes(count), np.uint8).astype(np.float32) / 256 + 0.1
        return int(kind), values.astype(np.float16 if kind == Type.F16 else np.float32).tobytes()
    blocks = np.frombuffer(rng.randbytes(count // block * size), np.uint8).reshape(-1, size).copy()
    for at in (208,) if kind == Type.Q6_K else (0, 2):
        blocks[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return int(kind), blocks.tobytes()


def damage_gguf(rng: random.Random, made: Gguf) -> bytes:
    """The bytes of the file after up to three changes of its parts, and perhaps of its bytes."""
    parts: list[Callable[[random.Random, Gguf], None]] = [
        _odd_field,
        _odd_field,
        _odd_array,
        _odd_tensor,
        _odd_tensor,
        _odd_list,
    ]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        rng.choice(parts)(rng, made)
    if rng.random() < 0.1:
        made.counts = [rng.choice([len(made.tensors), *ODD_INTS]), rng.choice([len(made.fields), *ODD_INTS])]
    content = made.written()
    return damage_bytes(rng, content, 2000) if rng.random() < 0.4 else content


def _odd_field(rng: random.Random, made: Gguf) -> None:
    chosen = rng.choice(made.fields)
    if rng.random() < 0.4 or chosen.kind == ARRAY:
        chosen.kind = rng.choice([*SCALARS, TEXT, 13, 99])
    if chosen.kind == TEXT:
        chosen.raw = _text(rng.choice(ODD_TEXTS))
    elif chosen.kind in SCALARS:
        code = SCALARS[chosen.kind]
        if code in "fd":
            chosen.raw = struct.pack(f"<{code}", rng.choice(ODD_FLOATS))
        else:
            raw = struct.pack("<Q", rng.choice(ODD_INTS))
            chosen.raw = raw[: struct.calcsize(f"<{code}")]


def _odd_array(rng: random.Random, made: Gguf) -> None:
    chosen = rng.choice([f for f in made.fields if f.kind == ARRAY] or made.fields)
    kind, length = rng.choice([*SCALARS, TEXT, ARRAY, 13]), rng.choice((0, 1, VOCAB, *ODD_INTS))
    chosen.kind = ARRAY
    old = struct.unpack("<IQ", chosen.raw[:12]) if len(chosen.raw) >= 12 else (kind, length)
    chosen.raw = struct.pack("<IQ", *rng.choice([(kind, old[1]), (old[0], length), (kind, length)])) + chosen.raw[12:]


def _odd_tensor(rng: random.Random, made: Gguf) -> None:
    chosen = rng.choice(made.tensors)
    what = rng.randrange(5)
    if what == 0 and chosen.sizes:
        chosen.sizes[rng.randrange(len(chosen.sizes))] = rng.choice(ODD_INTS)
    elif what == 1:
        chosen.sizes = rng.choice(([], [1, *chosen.sizes], [*chosen.sizes, 1], chosen.sizes[::-1], chosen.sizes * 3))
    elif what == 2:
        chosen.kind = rng.choice([*range(42), 2**31, 2**32 - 1])
    elif what == 3:
        chosen.offset = rng.choice((*ODD_INTS, 32, 64, 2**64 - 32))
    else:
        at = rng.randrange(max(len(chosen.data) // 4, 1)) * 4
        chosen.data = chosen.data[:at] + odd_number(rng) + chosen.data[at + 4 :]


def _odd_list(rng: random.Random, made: Gguf) -> None:
    """A field or tensor missing or twice, all in another order, or one under another name."""
    things: list[Any] = rng.choice((made.fields, made.tensors))
    at, what = rng.randrange(len(things)), rng.randrange(4)
    if what == 0 and len(things) > 1:
        del things[at]
    elif what == 1:
        things.insert(rng.randrange(len(things)), things[at])
    elif what == 2:
        rng.shuffle(things)
    elif isinstance(things[at], Field):
        things[at].key = rng.choice(ODD_TEXTS)
    else:
        things[at].name = rng.choice((*ODD_TEXTS, b"blk.7.attn_q.weight", b"blk.0.attn_q.bias", b"rope_freqs.weight"))
