"""Writes a ReLU-gated Llama with random weights: any shape and sparsity, an exact low-rank predictor, several formats.

    python scripts/make_synthetic_model.py OUT_FOLDER [--hidden 2048] [--layers 20] [--ffn 8192] [--active 0.10] ...

OUT_FOLDER gets `hf/` (a Hugging Face folder and `predictor.safetensors`), `powerinfer-f16.gguf` (PowerInfer's format)
and `f16.gguf`, `q8_0.gguf`, `q4_0.gguf` (the same weights for llama.cpp, which computes SiLU: for speed only). The
last line of stdout is JSON. The same arguments give the same bytes on the same machine.

What makes the model behave like a sparse one:

- Channel 0 of the residual stream is a constant: the embedding sets it, no layer writes it, so it acts as a bias.
- A gate row is U P - b e0, with P of `--rank` orthonormal rows. The sign of the gate is that of U P x - b x0, so the
  predictor fc1 = [P, -P, e0], ReLU, fc2 = [U, -U, -b] on the residual stream before the norm is exact. fc1 and fc2
  are filled up with zeros to a multiple of 64, which PowerInfer's CUDA kernels assume.
- b is a quantile of U P x / x0 over sample texts, so that neuron i fires with probability p_i in every layer. The p_i
  fall by a power law: their mean is `--active`, and a fifth of the neurons, at random places, makes 80 % of the firing.
- The head's row of a word is the embedding of its predecessor on a random cycle through the words, so greedy text
  follows the cycle with wide margins. Bytes and special tokens look like words and have no row: text has words only.
- With `--topics T`, word w belongs to topic (w - 259) % T, its embedding leans to the topic's direction, which every P
  sees, and cycles stay within topics: which neurons are hot depends on the topic.
"""

import argparse
import errno
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FORMATS = ("hf", "powerinfer", "gguf-f16", "gguf-q8_0", "gguf-q4_0")
DTYPES = {"f16": torch.float16, "f32": torch.float32, "bf16": torch.bfloat16}
SAFETENSORS_TYPES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_WORD = len(SPECIAL) + 256
BLOCK = 32  # of GGUF's quantised types
PREDICTOR_BLOCK = 64
POWERINFER_MAGIC = b"PWRI"
NORM_EPS, ROPE_BASE = 1e-5, 10000.0

HOT, HOT_SHARE, PEAK = 0.21, 0.8, 0.95  # this part of the neurons makes this share of the firing; the highest p_i
ATTENTION_SHARPNESS = 1.5  # deviation of queries and keys: attention picks out a few tokens
TRUE_LOGIT = 20.0
SAMPLES, SAMPLE_LENGTH = 16, 64

# Keys of the random streams: one of each per layer, so that no tensor's numbers depend on another's shape.
EMBED, WORDS, TOPIC, TEXTS, QUERY, KEY, VALUE, OUTPUT, BASIS, MIX, RATES, UP, DOWN = range(13)

HF_NAMES = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
GGUF_NAMES = {
    "embed": "token_embd",
    "head": "output",
    "norm": "output_norm",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
PREDICTOR = ("fc1", "fc2")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    rank: int
    topics: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def predictor(self) -> int:
        """Rows of fc1: P, -P, e0, and zeros."""
        return -(-(2 * self.rank + 1) // PREDICTOR_BLOCK) * PREDICTOR_BLOCK

    def check(self) -> str | None:
        """What is wrong with it."""
        for name in ("hidden", "layers", "ffn", "heads", "kv_heads", "rank", "topics", "context"):
            if getattr(self, name) < 1:
                return f"--{name.replace('_', '-')} must be at least 1"
        for name in ("hidden", "ffn"):
            if getattr(self, name) % BLOCK:
                return f"--{name} must be a multiple of {BLOCK}"
        if self.hidden % self.heads or self.head_dim % 2:
            return "--hidden must be an even multiple of --heads"
        if self.heads % self.kv_heads:
            return "--heads must be a multiple of --kv-heads"
        if self.rank > self.hidden // 2:
            return "--rank must be at most half of --hidden"
        if self.vocab < FIRST_WORD + 2 * self.topics:
            return f"--vocab must be at least {FIRST_WORD + 2 * self.topics}: special tokens, bytes, 2 words a topic"
        return None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor in the order in which `Maker` makes it."""
        yield from (("embed", (self.vocab, self.hidden)), ("head", (self.vocab, self.hidden)))
        kv = self.kv_heads * self.head_dim
        parts = {
            "attn_norm": (self.hidden,),
            "q": (self.hidden, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, self.hidden),
            "ffn_norm": (self.hidden,),
            "gate": (self.ffn, self.hidden),
            "up": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
            "fc1": (self.predictor, self.hidden),
            "fc2": (self.ffn, self.predictor),
        }
        for layer in range(self.layers):
            yield from ((f"layers.{layer}.{part}", shape) for part, shape in parts.items())
        yield "norm", (self.hidden,)


def firing_rates(count: int, active: float) -> npt.NDArray[np.float64]:
    """`count` probabilities, highest first: PEAK / (1 + u / knee) ** slope of the rank u in 0..1, of mean `active`.

    The slope is such that the first HOT of them make HOT_SHARE of the sum, or as much as the mean allows.
    """
    u = (np.arange(count) + 0.5) / count

    def rates(slope: float) -> npt.NDArray[np.float64]:
        low, high = -12.0, 12.0
        for _ in range(60):
            knee = (low + high) / 2
            if float((PEAK * (1 + u / math.exp(knee)) ** -slope).mean()) < active:
                low = knee
            else:
                high = knee
        return np.asarray(PEAK * (1 + u / math.exp(low)) ** -slope)

    low, high = 0.3, 40.0
    for _ in range(50):
        slope = (low + high) / 2
        found = rates(slope)
        if float(found[u < HOT].sum()) < HOT_SHARE * float(found.sum()):
            low = slope
        else:
            high = slope
    return rates(low)


class Maker:
    """Makes the tensors one after another, running sample texts through the layers as it goes."""

    def __init__(self, shape: Shape, active: float, seed: int, dtype: torch.dtype) -> None:
        self.shape = shape
        self.seed = seed
        self.dtype = dtype
        self.rates = firing_rates(shape.ffn, active)
        self.bias = math.sqrt(shape.hidden) / 4  # channel 0; the other channels are about one
        # What all layers together add to a stream of mean square one; little where few channels must carry the word.
        self.step = math.sqrt(min(1.0, shape.hidden / 256) / (2 * shape.layers))
        self.firing: list[float] = []
        self._topics = self._directions()
        self._cycles = self._words()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values in the order of `Shape.tensors`: float32 that `dtype` holds exactly."""
        x = yield from self._embeddings()
        for layer in range(self.shape.layers):
            for part, values in self._layer(layer, x):
                yield f"layers.{layer}.{part}", values
        yield "norm", torch.ones(self.shape.hidden)

    def texts(self) -> Tensor:
        """Sample token ids, walks along the cycles that take the topics in turn."""
        count = max(SAMPLES, self.shape.topics)
        length = max(16, SAMPLES * SAMPLE_LENGTH // count)
        rng = self._rng(TEXTS)
        rows = []
        for number in range(count):
            cycle = self._cycles[number % len(self._cycles)]
            rows.append(cycle[(rng.integers(len(cycle)) + np.arange(length)) % len(cycle)])
        return torch.from_numpy(np.stack(rows))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _normal(self, rows: int, columns: int, *key: int, scale: float = 1.0) -> Tensor:
        values = torch.from_numpy(self._rng(*key).standard_normal((rows, columns), np.float32))
        return values if scale == 1.0 else values.mul_(scale)

    def _round(self, values: Tensor) -> Tensor:
        return values if self.dtype == torch.float32 else values.to(self.dtype).float()

    def _directions(self) -> Tensor | None:
        """A unit vector per topic, within the few dimensions that all layers' P share; nothing in channel 0."""
        topics, hidden = self.shape.topics, self.shape.hidden
        if topics == 1:
            return None
        shared = min(topics, max(1, self.shape.rank // 2))
        self._shared, _ = torch.linalg.qr(self._normal(hidden - 1, shared, TOPIC))
        mix = torch.eye(topics) if shared == topics else self._normal(topics, shared, TOPIC, 1)
        directions = torch.zeros(topics, hidden)
        directions[:, 1:] = (mix / mix.norm(dim=1, keepdim=True)) @ self._shared.T
        return directions

    def _words(self) -> list[npt.NDArray[np.int64]]:
        """A cycle through the words of each topic."""
        topics = self.shape.topics
        rng = self._rng(WORDS)
        return [rng.permutation(np.arange(FIRST_WORD + k, self.shape.vocab, topics)) for k in range(topics)]

    def _embeddings(self) -> Generator[tuple[str, Tensor], None, Tensor]:
        """Embedding and head; returns the sample texts' residual stream."""
        shape = self.shape
        values = self._normal(shape.vocab, shape.hidden, EMBED)
        # Bytes and special tokens take the place of a word each.
        stand_in = self._rng(WORDS, 1).integers(FIRST_WORD, shape.vocab, FIRST_WORD)
        values[:FIRST_WORD] = values[torch.from_numpy(stand_in)]
        values[:, 0] = 0.0

        embed = values.clone()
        if self._topics is not None:
            topic = (np.concatenate((stand_in, np.arange(FIRST_WORD, shape.vocab))) - FIRST_WORD) % shape.topics
            embed.add_(self._topics[torch.from_numpy(topic)], alpha=math.sqrt(shape.rank))
        embed[:, 0] = self.bias
        embed = self._round(embed)
        x = embed[self.texts()]
        yield "embed", embed
        del embed

        before = torch.zeros(shape.vocab, dtype=torch.int64)
        for cycle in self._cycles:
            before[torch.from_numpy(cycle)] = torch.from_numpy(np.roll(cycle, 1))
        head = values[before].mul_(TRUE_LOGIT / shape.hidden)
        del values
        head[:FIRST_WORD] = 0.0
        yield "head", self._round(head)
        return x

    def _layer(self, layer: int, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The layer's tensors; `x` goes through it."""
        hidden, ffn, rank = self.shape.hidden, self.shape.ffn, self.shape.rank
        usual = 1 / math.sqrt(hidden)
        yield "attn_norm", torch.ones(hidden)
        h = normed(x)
        kv = self.shape.kv_heads * self.shape.head_dim
        sharp = ATTENTION_SHARPNESS * usual
        q = self._round(self._normal(hidden, hidden, QUERY, layer, scale=sharp))
        k = self._round(self._normal(kv, hidden, KEY, layer, scale=sharp))
        v = self._round(self._normal(kv, hidden, VALUE, layer, scale=usual))
        yield from (("q", q), ("k", k), ("v", v))
        inner = self._attention(h @ q.T, h @ k.T, h @ v.T)
        del q, k, v
        o = self._output(self._normal(hidden, hidden, OUTPUT, layer), inner)
        x += inner @ o.T
        yield "o", o
        del o

        yield "ffn_norm", torch.ones(hidden)
        p = self._round(self._basis(layer))
        u = self._round(self._normal(ffn, rank, MIX, layer, scale=1 / math.sqrt(rank)))
        rates = torch.from_numpy(self._rng(RATES, layer).permutation(self.rates).astype(np.float32))
        b = self._round(quantiles((x.flatten(0, 1) @ p.T @ u.T).div_(self.bias), 1 - rates))
        gate = u @ p
        gate[:, 0] = -b
        gate = self._round(gate)
        h = normed(x)
        inner = (h @ gate.T).relu_()
        self.firing.append(float((inner > 0).float().mean()))
        yield "gate", gate
        del gate
        up = self._round(self._normal(ffn, hidden, UP, layer, scale=usual))
        inner *= h @ up.T
        yield "up", up
        del up
        down = self._output(self._normal(hidden, ffn, DOWN, layer), inner)
        x += inner @ down.T
        yield "down", down
        del down

        fc1 = torch.zeros(self.shape.predictor, hidden)
        fc1[:rank], fc1[rank : 2 * rank], fc1[2 * rank, 0] = p, -p, 1.0
        fc2 = torch.zeros(ffn, self.shape.predictor)
        fc2[:, :rank], fc2[:, rank : 2 * rank], fc2[:, 2 * rank] = u, -u, -b
        yield from (("fc1", fc1), ("fc2", fc2))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over the sample texts, [text, position, channel]."""
        size = self.shape.head_dim
        q, k, v = (rows.view(*rows.shape[:2], -1, size).transpose(1, 2) for rows in (q, k, v))
        angles = torch.outer(
            torch.arange(q.shape[2], dtype=torch.float32), ROPE_BASE ** -(torch.arange(0, size, 2) / size)
        )
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        q, k = (rows * cos + torch.cat((-rows[..., size // 2 :], rows[..., : size // 2]), -1) * sin for rows in (q, k))
        k, v = (rows.repeat_interleave(self.shape.heads // self.shape.kv_heads, dim=1) for rows in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def _output(self, values: Tensor, inner: Tensor) -> Tensor:
        """`values` scaled so that what it makes of `inner` has a mean square of step ** 2; channel 0 gets nothing."""
        size = float(inner.square().sum(-1).mean().sqrt())
        values.mul_(self.step / max(size, 1e-6))
        values[0] = 0.0
        return self._round(values)

    def _basis(self, layer: int) -> Tensor:
        """Orthonormal rows whose span holds the topics' directions."""
        hidden, rank = self.shape.hidden, self.shape.rank
        columns = self._normal(hidden - 1, rank, BASIS, layer)
        if self._topics is not None:
            columns[:, : self._shared.shape[1]] = self._shared
        basis = torch.zeros(rank, hidden)
        basis[:, 1:] = torch.linalg.qr(columns)[0].T
        return basis


def normed(x: Tensor) -> Tensor:
    """RMSNorm with weights of one."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)


def quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Of each column of `values` its own quantile."""
    values = values.sort(dim=0).values
    at = levels * (len(values) - 1)
    low = at.long().clamp(0, len(values) - 2)
    below, above = (values.gather(0, (low + i)[None])[0] for i in (0, 1))
    return torch.lerp(below, above, at - low)


class Sink(Protocol):
    """A file that takes the tensors as they are made."""

    nbytes: int

    def write(self, name: str, values: Tensor) -> None:
        """Takes the tensor if the file has it; they must come in the order of `Shape.tensors`."""

    def close(self) -> None:
        """The file is whole."""


class Safetensors:
    """A safetensors file, written from its start to its end."""

    def __init__(
        self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], dtype: torch.dtype, metadata: dict[str, str]
    ) -> None:
        """`tensors`: published name and shape of each of ours."""
        self._names = list(tensors)
        self._dtype = dtype
        header: dict[str, Any] = {"__metadata__": metadata}
        self.nbytes = 0
        for name, shape in tensors.values():
            end = self.nbytes + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_TYPES[dtype],
                "shape": list(shape),
                "data_offsets": [self.nbytes, end],
            }
            self.nbytes = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: Tensor) -> None:
        if self._names and name == self._names[0]:
            self._names.pop(0)
            self._file.write(values.to(self._dtype).contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.close()


class Gguf:
    """A GGUF file: for llama.cpp, or with `predictor` for PowerInfer, which has `ffn_down` turned and a magic."""

    def __init__(self, path: Path, shape: Shape, kind: Type, *, predictor: bool) -> None:
        self._path, self._shape, self._kind, self._predictor = path, shape, kind, predictor
        self._writer = gguf.GGUFWriter(path, "llama")
        self._describe(path.stem)
        self._names: list[str] = []
        self.nbytes = 0
        for name, size in shape.tensors():
            part = name.rpartition(".")[2]
            if part in PREDICTOR and not predictor:
                continue
            if self._turned(part):
                size = size[::-1]
            block, nbytes = gguf.GGML_QUANT_SIZES[self._type(size)]
            nbytes = math.prod(size) // block * nbytes
            self._writer.add_tensor_info(self._published(name), size, np.float16, nbytes, raw_dtype=self._type(size))
            self._names.append(name)
            self.nbytes += nbytes
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()

    def write(self, name: str, values: Tensor) -> None:
        if not self._names or name != self._names[0]:
            return
        self._names.pop(0)
        part = name.rpartition(".")[2]
        if part in ("q", "k"):
            # RoPE's pairs are neighbours here, halves of the head in transformers.
            size = self._shape.head_dim
            values = values.view(-1, 2, size // 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        elif self._turned(part):
            values = values.T
        kind = self._type(tuple(values.shape))
        if kind == Type.F16:
            self._writer.write_tensor_data(values.half().contiguous().numpy())
        else:
            self._writer.write_tensor_data(gguf.quantize(values.contiguous().numpy(), kind))

    def close(self) -> None:
        self._writer.close()
        if self._predictor and not self._names:
            with self._path.open("r+b") as file:
                file.write(POWERINFER_MAGIC)

    def _turned(self, part: str) -> bool:
        return self._predictor and part == "down"

    def _type(self, shape: tuple[int, ...]) -> Type:
        return self._kind if len(shape) == 2 else Type.F32

    def _published(self, name: str) -> str:
        if "." not in name:
            return f"{GGUF_NAMES[name]}.weight"
        _, layer, part = name.split(".")
        return f"blk.{layer}.{GGUF_NAMES.get(part, part)}{'_t' if self._turned(part) else ''}.weight"

    def _describe(self, name: str) -> None:
        writer, shape = self._writer, self._shape
        writer.add_name(f"synthetic {name}")
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(ROPE_BASE)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_layer_norm_rms_eps(NORM_EPS)
        writer.add_vocab_size(shape.vocab)
        file_types = {Type.F16: "MOSTLY_F16", Type.Q8_0: "MOSTLY_Q8_0", Type.Q4_0: "MOSTLY_Q4_0"}
        writer.add_file_type(gguf.LlamaFileType[file_types[self._kind]])
        if self._kind != Type.F16:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if self._predictor:
            writer.add_float32("powerinfer.sparse_threshold", 0.0)
        words = shape.vocab - FIRST_WORD
        kinds = gguf.TokenType
        writer.add_tokenizer_model("llama")
        writer.add_token_list([token if i < FIRST_WORD else f"▁{token}" for i, token in enumerate(tokens(shape.vocab))])
        writer.add_token_scores([0.0] * FIRST_WORD + [-float(i) for i in range(words)])
        writer.add_token_types(
            [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * words]
        )
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)


def tokens(vocab: int) -> list[str]:
    """The vocabulary as text."""
    return [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *(f"w{i}" for i in range(FIRST_WORD, vocab))]


def open_hf(folder: Path, shape: Shape, dtype: torch.dtype) -> list[Sink]:
    """The folder's settings and tokenizer, and its weight files to be written."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "relu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens(shape.vocab))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": shape.context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    model: dict[str, tuple[str, tuple[int, ...]]] = {}
    predictor: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, size in shape.tensors():
        front, _, part = name.rpartition(".")
        if part in PREDICTOR:
            predictor[name] = (f"{name}.weight", size)
        else:
            model[name] = (f"model.{front}.{HF_NAMES[part]}.weight" if front else f"{HF_NAMES[part]}.weight", size)
    how = {"input": "residual", "activation": "relu", "threshold": "0"}
    return [
        Safetensors(folder / "model.safetensors", model, dtype, {"format": "pt"}),
        Safetensors(folder / "predictor.safetensors", predictor, dtype, how),
    ]


def open_sink(folder: Path, name: str, shape: Shape, dtype: torch.dtype) -> list[Sink]:
    """The files of one of FORMATS."""
    if name == "hf":
        return open_hf(folder / "hf", shape, dtype)
    if name == "powerinfer":
        return [Gguf(folder / "powerinfer-f16.gguf", shape, Type.F16, predictor=True)]
    kind = name.removeprefix("gguf-")
    return [Gguf(folder / f"{kind}.gguf", shape, Type[kind.upper()], predictor=False)]


def write_model(folder: Path, maker: Maker, formats: Sequence[str]) -> None:
    """Fills `folder`; raises OSError if it cannot."""
    with ExitStack() as stack:
        sinks = [sink for name in formats for sink in open_sink(folder, name, maker.shape, maker.dtype)]
        for sink in sinks:
            stack.callback(sink.close)
        needed, free = sum(sink.nbytes for sink in sinks), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        started = time.perf_counter()
        for name, values in maker.weights():
            for sink in sinks:
                sink.write(name, values)
            if name.endswith(".fc2"):
                done, seconds = len(maker.firing), time.perf_counter() - started
                print(f"layer {done}/{maker.shape.layers}: {maker.firing[-1]:.1%} firing, {seconds:.0f} s", flush=True)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Shape]:
    """Exits with code 2 if the arguments make no sense."""
    parser = Parser(
        prog="make_synthetic_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="is made; must not exist or be empty")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=63, help="of the gate matrices")
    parser.add_argument("--active", type=float, default=0.10, help="share of the neurons that a token fires")
    parser.add_argument("--topics", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="f16", help="of hf/, which the other files are made from")
    parser.add_argument("--formats", default=",".join(FORMATS), help="default: %(default)s")
    wish = parser.parse_args(arguments)
    names = list(Shape.__dataclass_fields__)
    shape = Shape(**{name: getattr(wish, name) for name in names})
    problem = shape.check()
    wish.formats = [name for name in wish.formats.split(",") if name]
    unknown = [name for name in wish.formats if name not in FORMATS]
    if problem:
        parser.error(problem)
    if not 0.005 <= wish.active <= 0.5:
        parser.error("--active must be between 0.005 and 0.5")
    if wish.seed < 0:
        parser.error("--seed must not be negative")
    if unknown or not wish.formats:
        parser.error(f"--formats: '{','.join(unknown)}' is not one of {', '.join(FORMATS)}")
    if wish.out.exists() and (not wish.out.is_dir() or any(wish.out.iterdir())):
        parser.error(f"{wish.out} exists already")
    if not wish.out.absolute().parent.is_dir():
        parser.error(f"{wish.out.parent} is not a folder")
    return wish, shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model; returns the exit code."""
    wish, shape = parse(arguments)
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums, and with them the last bits, depend on how many there are
    folder = None
    try:
        # Next to its place, so that it gets there in one step and whole.
        folder = Path(tempfile.mkdtemp(prefix=f".{wish.out.name}.", dir=wish.out.absolute().parent))
        maker = Maker(shape, wish.active, wish.seed, DTYPES[wish.dtype])
        with torch.inference_mode():
            write_model(folder, maker, list(dict.fromkeys(wish.formats)))
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        folder.chmod(0o755)
        os.rename(folder, wish.out)
    except OSError as error:
        reason = error.strerror or "the disk did not take all of it"  # numpy's has no text
        print(f"make_synthetic_model.py: cannot write {wish.out}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_synthetic_model.py: interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    count = sum(math.prod(size) for name, size in shape.tensors() if name.rpartition(".")[2] not in PREDICTOR)
    result = {
        "parameters": count,
        "firing": [round(share, 4) for share in maker.firing],
        "seconds": round(time.perf_counter() - started, 1),
        "bytes": sizes,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-written stays
    sys.exit(main())
