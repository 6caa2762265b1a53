"""Hugging Face folders, of one weight file or of shards, and damage to their meaning."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fuzzing.damage import ODD_FLOATS, ODD_INTS, damage_bytes, odd_number

__all__ = ["damage_folder", "make_folder"]

HIDDEN, FFN, VOCAB = 64, 96, 48


def make_folder(rng: random.Random) -> dict[str, bytes]:
    """The files of an undamaged folder of two layers."""
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
    """The files after up to three changes; a path in place of bytes is a link, or a pipe if it is empty."""
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
    """Replace, remove, rename or repeat up to three values; some become very deep or very long."""
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
    """Damage the header as JSON or as bytes, or a number of the data."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], bytearray(content[8 + length :])
    what = rng.randrange(4)
    if what == 0 and len(data) > 8:
        at = rng.randrange(len(data) // 4) * 4
        data[at : at + 4] = odd_number(rng)
    elif what == 1:
        header = b"{" + header[1:].partition(b"},")[0] + b"}," + header[1:]  # the first member twice
    elif what == 2:
        return damage_bytes(rng, content, 8 + length)
    else:
        header = _damage_json(rng, header)
    return len(header).to_bytes(8, "little") + header + data
