"""Random damage to model files: each must be refused in one line, or read and packed.

    python scripts/fuzz_models.py [--count N] [--seed S] [--keep FOLDER]

Half of the inputs are GGUF files (plain ones and PowerInfer's, of several block types), half Hugging Face folders (one
file and shards, with predictors). Damage is done to bytes (flipped, cut, inserted, odd numbers written over the head)
and to meaning (fields, counts, offsets, types, names, JSON values, links, encodings, weights that are not finite).
Each input is read, packed and its tokenizer tried in a child, forked with all imports done, with bounds on memory and
time. Prints how many ended how, then one JSON object; exit code 1 if a child left a traceback, wrote more than its
line, packed numbers that mean nothing, was killed by a signal, or exceeded a bound. `--keep` keeps the inputs of
those. Equal seeds give equal damage.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save

import warmfront.coordinator.models.gguf.reader
import warmfront.coordinator.models.hf.reader  # noqa: F401  # both imported late elsewhere: not anew in every child
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.errors import WarmfrontError
from warmfront.shared.model.formats import BLOCK, row_bytes, unpack
from warmfront.shared.model.store import PackedModel

MEMORY, SECONDS = 1 << 30, 10.0
HIDDEN, FFN, VOCAB = 64, 96, 48
ODD_INTS = (0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ODD_FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e-45, 1e-30, 1e38)
ODD_TEXTS = (b"", b"\xff\xfe", b"a\nb\x1b[31m", "\U0001f642\u0301".encode(), b"llama", b"x" * 5000, b"../x", b"\0")
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
U32, F32, TEXT, ARRAY = 4, 6, 8, 9


# GGUF files


@dataclass
class Field:
    key: bytes
    kind: int
    raw: bytes

    def written(self) -> bytes:
        return _text(self.key) + struct.pack("<I", self.kind) + self.raw


@dataclass
class Tensor:
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
    """A file in parts that can be damaged one by one."""

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
    """A whole one-layer file."""
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
    """Number of the type, and bytes of such weights."""
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
    """The bytes of the file after one to three changes of its parts, or of its bytes."""
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
        odd = rng.choice((struct.pack("<f", rng.choice(ODD_FLOATS)), b"\0\x7e\0\x7c", b"\xff" * 4))
        chosen.data = chosen.data[:at] + odd + chosen.data[at + 4 :]


def _odd_list(rng: random.Random, made: Gguf) -> None:
    """Something missing, twice, in another order or under another name."""
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


def damage_bytes(rng: random.Random, content: bytes, head: int) -> bytes:
    """Flipped bits, odd numbers, a piece cut out, doubled or put in, or the end missing; mostly in the first bytes."""
    out = bytearray(content)
    within = min(head, len(out)) if rng.random() < 0.7 else len(out)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(max(within, 1))
        what = rng.randrange(6)
        if what <= 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            out[at : at + 8] = struct.pack("<Q", rng.choice(ODD_INTS))
        elif what == 3:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif what == 4:
            out[at:at] = rng.choice((b"\0", rng.randbytes(8), bytes(out[at : at + 50])))
        else:
            del out[at:]
    return bytes(out)


# Hugging Face folders


def make_folder(rng: random.Random) -> dict[str, bytes]:
    """The files of a whole two-layer folder."""
    tied, sharded, relu = rng.random() < 0.3, rng.random() < 0.5, rng.random() < 0.5
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "relu" if relu else "silu",
        "tie_word_embeddings": tied, "attention_bias": False, "bos_token_id": 1, "eos_token_id": [2, 3],
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }  # fmt: skip
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": f"<s{i}>", "special": True} | plain for i in range(3)]
    vocab = {f"<s{i}>": i for i in range(3)} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<s0>"},
    }  # fmt: skip
    settings = {
        "bos_token": "<s1>",
        "eos_token": {"content": "<s2>"},
        "add_bos_token": True,
        "chat_template": "{{ a }}",
    }
    files: dict[str, Any] = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": 2},
    }
    out = {name: json.dumps(value).encode() for name, value in files.items()}
    tensors = _folder_weights(rng, head=not tied)
    if sharded:
        names = sorted(tensors)
        where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in ("model-0.safetensors", "model-1.safetensors"):
            out[file] = save({name: tensors[name] for name in names if where[name] == file})
        out["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": where}).encode()
    else:
        out["model.safetensors"] = save(tensors)
    if relu:
        shapes = {"fc1": (8, HIDDEN), "fc2": (FFN, 8)}
        fc = {f"layers.{i}.{n}.weight": np.full(s, 0.1, np.float32) for i in range(2) for n, s in shapes.items()}
        out["predictor.safetensors"] = save(fc, {"threshold": "0.5", "input": "normed"})
    return out


def _folder_weights(rng: random.Random, *, head: bool) -> dict[str, Any]:
    dtype = rng.choice((np.float32, np.float16))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shapes |= {"lm_head": (VOCAB, HIDDEN)} if head else {}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm": (HIDDEN,), at + "post_attention_layernorm": (HIDDEN,)}
        shapes |= {f"{at}self_attn.{p}_proj": (HIDDEN if p in "qo" else 32, HIDDEN) for p in "qkvo"}
        shapes |= {at + "mlp.gate_proj": (FFN, HIDDEN), at + "mlp.up_proj": (FFN, HIDDEN)}
        shapes |= {at + "mlp.down_proj": (HIDDEN, FFN)}
    return {f"{name}.weight": np.full(shape, rng.random(), dtype) for name, shape in shapes.items()}


def damage_folder(rng: random.Random, files: dict[str, bytes]) -> dict[str, bytes | Path]:
    """The files after one to three changes; a path in place of bytes is a link, or a pipe where it is empty."""
    out: dict[str, bytes | Path] = dict(files)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        name = rng.choice(sorted(out))
        content = out[name]
        if isinstance(content, Path):
            continue
        if name.endswith(".json") and rng.random() < 0.8:
            out[name] = _damage_json(rng, content)
        elif name.endswith(".safetensors") and rng.random() < 0.8:
            out[name] = _damage_safetensors(rng, content)
        else:
            what = rng.randrange(6)
            if what == 0:
                del out[name]
            elif what == 1:
                out[name] = Path(rng.choice(("", "/dev/zero", "..", "/etc/passwd", name, "config.json", "nowhere")))
            elif what == 2:
                out[name] = rng.choice(
                    (b"\xef\xbb\xbf" + content, content.decode("latin-1").encode("utf-16"), b"", b"[]")
                )
            elif what == 3:
                out[rng.choice(("chat_template.jinja", "adapter_config.json", "more.bin", "x\n\x1b"))] = content
            else:
                out[name] = damage_bytes(rng, content, 500)
    return out


def _damage_json(rng: random.Random, content: bytes) -> bytes:
    """One to three values replaced, removed, renamed or written twice; or something deep or long in place of one."""
    try:
        whole = json.loads(content)
    except (RecursionError, ValueError):
        whole = None
    if not isinstance(whole, dict | list):
        return damage_bytes(rng, content, 500)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _odd_value(rng, whole)
    text = json.dumps(whole)
    for mark, what in (('"DEEP"', '{"a":' * 50_000), ('"LONG"', "9" * 6000)):
        text = text.replace(mark, what)
    return text.encode()


def _odd_value(rng: random.Random, whole: Any) -> None:
    places = [(whole, key) for key in (whole if isinstance(whole, dict) else range(len(whole)))]
    for value, key in places:
        if isinstance(value[key], dict | list):
            inner = value[key]
            places += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))][:60]
    if not places:
        return
    within, key = rng.choice(places)
    odd: list[Any] = [
        None,
        True,
        "",
        "two",
        "\n\x1b",
        "\ud800",
        [],
        {},
        [[2]],
        {"a": 1},
        2.5,
        -1,
        -7,
        10**20,
        10**12,
        "DEEP",
    ]
    odd += [
        *ODD_INTS,
        *ODD_FLOATS,
        "LONG",
        "../x.safetensors",
        "/etc/passwd",
        "(a+)+$",
        "relu",
        "linear",
        [1, "2"],
        1e400,
    ]
    what = rng.randrange(8)
    if what == 0:
        del within[key]
    elif what == 1 and isinstance(within, dict):
        within[rng.choice(("a", "x\n", "q_norm", "model.layers.7.mlp.up_proj.weight"))] = within.pop(key)
    elif what == 2 and isinstance(within, dict):
        within[key + "_again"] = within[key]
    else:
        within[key] = rng.choice(odd)


def _damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header as JSON, or numbers of the data."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], bytearray(content[8 + length :])
    what = rng.randrange(4)
    if what == 0 and len(data) > 8:
        at = rng.randrange(len(data) // 4) * 4
        data[at : at + 4] = rng.choice((struct.pack("<f", rng.choice(ODD_FLOATS)), b"\0\x7e\0\x7c", b"\xff" * 4))
    elif what == 1:
        header = b"{" + header[1:].partition(b"},")[0] + b"}," + header[1:]  # the first member twice
    elif what == 2:
        return damage_bytes(rng, content, 8 + length)
    else:
        header = _damage_json(rng, header)
    return len(header).to_bytes(8, "little") + header + data


# Trying


@dataclass
class Outcome:
    """How a child ended: `kind` is packed, refused, or what must not be; `said` is what it wrote to stderr."""

    kind: str
    said: str

    @property
    def violation(self) -> bool:
        return self.kind not in ("packed", "refused")


def attempt(path: Path, dtype: str, cache: Path) -> Outcome:
    """Read and pack the model at `path` in a child."""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os._exit(_child(path, dtype, cache, output.fileno()))
        deadline = time.monotonic() + SECONDS
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Outcome("hang", "")
            time.sleep(0.001)
        output.seek(0)
        said = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(done[1])
    if code < 0:
        return Outcome(f"signal {-code}", said)
    if "MemoryError" in said:
        return Outcome("memory", said)
    lines = said.splitlines()
    if (code == 0 and lines) or (code == 1 and (len(lines) != 1 or not lines[0].isprintable())):
        return Outcome("not one line", said)
    return Outcome({0: "packed", 1: "refused"}.get(code, "traceback"), said)


def _child(path: Path, dtype: str, cache: Path, output: int) -> int:
    """0 packed, 1 refused with its line on stderr, 2 with a traceback."""
    os.dup2(output, 2)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["XDG_CACHE_HOME"] = str(cache)
    try:
        with PackedModel(ensure_packed(path, dtype, lambda line: None, lambda done, total: None)) as packed:
            _check_numbers(packed)
            tokenizer = Tokenizer(packed)
            if tokenizer.present:
                tokenizer.decode(tokenizer.encode("w3 w4 abc <s1>" + "a" * 40 + "!"))
    except WarmfrontError as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        return 1
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
        return 2
    return 0


def _check_numbers(packed: PackedModel) -> None:
    """What was read without complaint must mean something."""
    spec, ids = packed.spec, [packed.text.get(name) for name in ("bos_id", "eos_id")]
    epsilon, rotary = spec.architecture.norm.epsilon, spec.architecture.positions.rotary
    assert 0 < epsilon < float("inf"), epsilon
    assert all(0 < frequency < float("inf") for table in rotary for frequency in table.frequencies), rotary
    assert all(0 <= i < spec.vocab for i in (*ids, *packed.text.get("eos_ids", ())) if i is not None), packed.text
    for name, entry in packed.entries.items():
        if entry.element == "F32":
            assert np.isfinite(packed.floats(name)).all(), name
        elif entry.kind is not None:
            rows = packed.bytes_of(name).reshape(entry.shape)
            cols = entry.shape[1] * BLOCK // row_bytes(entry.kind, BLOCK)
            assert np.isfinite(unpack(rows, entry.kind, cols)).all(), name


def make(rng: random.Random, what: str, folder: Path) -> Path:
    """A damaged file or folder of the kind `what` within `folder`."""
    if what == "gguf":
        path = folder / "model.gguf"
        path.write_bytes(damage_gguf(rng, make_gguf(rng)))
        return path
    path = folder / "model"
    path.mkdir()
    for name, content in damage_folder(rng, make_folder(rng)).items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        elif content == Path():
            os.mkfifo(path / name)
        else:
            (path / name).symlink_to(content)
    return path


def keep(folder: Path, target: Path) -> None:
    """Copy the folder, but for pipes."""

    def pipes(within: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(within) / name).is_fifo()]

    shutil.copytree(folder, target, symlinks=True, ignore=pipes, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that broke a rule")
    wishes = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    kinds: dict[str, Counter[str]] = {"gguf": Counter(), "folder": Counter()}
    violations = []
    for number in range(wishes.count):
        rng, what = random.Random(f"{wishes.seed}/{number}"), ("gguf", "folder")[number % 2]
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            (Path(scratch) / "in").mkdir()
            path = make(rng, what, Path(scratch) / "in")
            outcome = attempt(path, rng.choice(("auto", "auto", "f16", "q8", "q4")), Path(scratch) / "cache")
            kinds[what][outcome.kind] += 1
            if outcome.violation:
                violations.append(
                    {"number": number, "input": what, "outcome": outcome.kind, "said": outcome.said[-2000:]}
                )
                print(f"{number} ({what}): {outcome.kind}\n{outcome.said}", file=sys.stderr)
                if wishes.keep:
                    shutil.copytree(
                        path.parent, wishes.keep / f"{wishes.seed}-{number}", symlinks=True, dirs_exist_ok=True
                    )
    for what, outcomes in kinds.items():
        print(f"{what:7}", ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common()))
    print(json.dumps({"seed": wishes.seed, "count": wishes.count, "outcomes": kinds, "violations": violations}))
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
