"""Everything of a model but its feed-forward layers in eager torch, on a CUDA device or emulated on the CPU.

Weights come from the packed file: float32, float16 and bfloat16 stay as they are, 8 and 4 bits are widened to float16.
The residual, norms, RoPE and biases are float32; the input of a matrix product is rounded to the type of the weights.
The KV cache is float32 or float16.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from warmfront.coordinator.decode.team_config import Place
from warmfront.shared.model.architecture import Attention
from warmfront.shared.model.branches import bounds_of, predictors_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import Kind, row_cols, unpack
from warmfront.shared.model.kv_layout import PAGE, pages_of
from warmfront.shared.model.spec import ModelSpec, Predictor
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Selector

__all__ = ["TorchNetwork", "device_bytes"]

_DTYPES = {Kind.F32: torch.float32, Kind.BF16: torch.bfloat16}
# Bytes of a packed matrix that are read and widened at a time.
_SLICE = 32 << 20
_ROWS = ("q", "k", "v")


class _Norm(NamedTuple):
    """The vectors of a norm. No weight: there is no norm here."""

    weight: Tensor | None
    bias: Tensor | None


class _Layer(NamedTuple):
    """A layer's tensors on the device; q, k and v are one matrix. None: the model has none, or it is not used."""

    attn_norm: _Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    attn_post_norm: _Norm
    ffn_norm: _Norm
    ffn_post_norm: _Norm
    # Of each branch of the feed-forward: [branches, hidden].
    down_bias: Tensor | None
    fc1: Tensor | None
    fc2: Tensor | None
    fc1_bias: Tensor | None
    fc2_bias: Tensor | None
    router: Tensor | None
    router_bias: Tensor | None
    sinks: Tensor | None


def _dtype(kind: Kind | None) -> torch.dtype:
    return _DTYPES.get(kind, torch.float16) if kind is not None else torch.float32


def _cache_shape(spec: ModelSpec, positions: int) -> tuple[int, int, int, int, int]:
    attention = spec.architecture.attention
    return 2, spec.layers, attention.kv_heads, positions, attention.head_dim


def _cols(model: PackedModel, name: str) -> int:
    """Weights of a row of a packed matrix."""
    entry = model.entries[name]
    assert entry.kind is not None
    return row_cols(entry.kind, entry.shape[1])


def device_bytes(model: PackedModel, positions: int, cache_kind: Kind, selector: Selector) -> int:
    """Bytes that a `TorchNetwork` takes on its device for weights and so many positions of KV cache; torch itself needs
    more."""
    total = int(np.prod(_cache_shape(model.spec, positions))) * _dtype(cache_kind).itemsize
    for name in model.resident(selector):
        entry = model.entries[name]
        total += (
            entry.nbytes if entry.kind is None else entry.shape[0] * _cols(model, name) * _dtype(entry.kind).itemsize
        )
    return total


class TorchNetwork:
    """Embedding, attention, predictors and head, as steps between those of the workers; call `load` first."""

    def __init__(
        self, model: PackedModel, device: str, context: int, cache_kind: Kind, selector: Selector, texts: int = 1
    ) -> None:
        """`texts`: how many of `context` tokens the KV cache holds."""
        self._model, self._device, self._selector = model, torch.device(device), selector
        self._context, self._cache_kind = context, cache_kind
        self._positions = texts * pages_of(context) * PAGE
        self._predictor = model.spec.predictor or Predictor()
        self.total = sum(model.entries[name].nbytes for name in model.resident(selector))
        self.loaded = 0  # bytes so far, of `total`

    def load(self, keep_going: Callable[[], bool]) -> None:
        """Read and widen the weights; stops early if `keep_going` returns False."""
        model, spec = self._model, self._model.spec
        with torch.inference_mode():
            have: dict[str, Tensor] = {}
            for name in model.resident(self._selector):
                if not keep_going():
                    return
                have[name] = self._read(name)
                self.loaded += model.entries[name].nbytes
            self._embed, self._norm = have["embed"], _norm(have, "norm")
            self._learned = have.get("positions")
            self._head = have.get("head", self._embed)
            self._layers = [self._layer(have, f"layers.{layer}.") for layer in range(spec.layers)]
            shape, dtype = _cache_shape(spec, self._positions), _dtype(self._cache_kind)
            self._keys, self._values = torch.zeros(shape, dtype=dtype, device=self._device)
            self._rotary = torch.from_numpy(spec.architecture.positions.tables(self._context)).to(self._device)
            self._bits = torch.arange(GROUP, dtype=torch.int32, device=self._device)

    def _read(self, name: str) -> Tensor:
        model, entry = self._model, self._model.entries[name]
        if entry.kind is None:
            return torch.from_numpy(model.floats(name)).to(self._device)
        rows, width = entry.shape
        cols = _cols(model, name)
        out = torch.empty((rows, cols), dtype=_dtype(entry.kind), device=self._device)
        step = max(8, _SLICE // width // 8 * 8)  # whole pieces, so that they are checked
        for first in range(0, rows, step):
            packed = np.empty((min(step, rows - first), width), np.uint8)
            model.read_into(name, packed, first * width)
            out[first : first + step] = torch.from_numpy(unpack(packed, entry.kind, cols))
        return out

    def _layer(self, have: dict[str, Tensor], prefix: str) -> _Layer:
        biases = [have.get(f"{prefix}{part}.bias") for part in _ROWS]
        matrices = [have.pop(prefix + part) for part in _ROWS]
        joint = [
            torch.zeros(len(matrix), device=self._device) if bias is None else bias
            for bias, matrix in zip(biases, matrices, strict=True)
        ]
        down_bias = have.get(f"{prefix}down.bias")
        return _Layer(
            attn_norm=_norm(have, f"{prefix}attn_norm"),
            qkv=torch.cat(matrices),
            qkv_bias=torch.cat(joint) if any(bias is not None for bias in biases) else None,
            q_norm=have.get(f"{prefix}q_norm"),
            k_norm=have.get(f"{prefix}k_norm"),
            o=have[f"{prefix}o"],
            o_bias=have.get(f"{prefix}o.bias"),
            attn_post_norm=_norm(have, f"{prefix}attn_post_norm"),
            ffn_norm=_norm(have, f"{prefix}{'attn' if self._model.spec.architecture.norm.shared else 'ffn'}_norm"),
            ffn_post_norm=_norm(have, f"{prefix}ffn_post_norm"),
            down_bias=None if down_bias is None else down_bias.view(-1, self._model.spec.hidden),
            fc1=have.get(f"{prefix}fc1"),
            fc2=have.get(f"{prefix}fc2"),
            fc1_bias=have.get(f"{prefix}fc1.bias"),
            fc2_bias=have.get(f"{prefix}fc2.bias"),
            router=have.get(f"{prefix}router"),
            router_bias=have.get(f"{prefix}router.bias"),
            sinks=have.get(f"{prefix}sinks"),
        )

    def embed(self, tokens: Tensor, position: int) -> Tensor:
        """The residual of token ids [n] from `position` on, which may be on any device: float32 [n, hidden]."""
        architecture = self._model.spec.architecture
        x = self._embed[tokens.to(self._device)].float() * architecture.embedding_scale
        if self._learned is None:
            return x
        first = position + (architecture.positions.learned_offset or 0)
        return x + self._learned[first : first + len(tokens)].float()

    def _where(self, table: npt.NDArray[np.int64], since: int, until: int) -> slice | Tensor:
        """Where in the cache the positions `since` to `until` of the text in the pages `table` are."""
        first, last = since // PAGE, -(-until // PAGE)
        pages = table[first:last]
        begin, count = since - first * PAGE, until - since
        if (np.diff(pages) == 1).all():
            at = int(pages[0]) * PAGE + begin
            return slice(at, at + count)
        rows = (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[begin : begin + count]
        return torch.from_numpy(rows).to(self._device)

    def attention_input(self, layer: int, x: Tensor) -> Tensor:
        """What q, k and v of `layer` get of the residual x [n, hidden]."""
        return self._normed(x, self._layers[layer].attn_norm)

    def _attend(self, layer: int, x: Tensor, place: Place) -> Tensor:
        """What attention in `layer` makes of the residual x [n, hidden] of the tokens from `place` on."""
        weights = self._layers[layer]
        return _linear(self.mixed(layer, self.attention_input(layer, x), place), weights.o, weights.o_bias)

    def mixed(self, layer: int, normed: Tensor, place: Place) -> Tensor:
        """What the heads of `layer` make of their input [n, hidden], the input of o: [n, heads * head_dim]."""
        position, table = place
        attention, weights, tokens = self._model.spec.architecture.attention, self._layers[layer], len(normed)
        heads, kv_heads, until = attention.heads, attention.kv_heads, position + tokens
        joint = _linear(normed, weights.qkv, weights.qkv_bias)
        joint = joint.view(tokens, heads + 2 * kv_heads, attention.head_dim)
        queries = self._normed_heads(joint[:, :heads], weights.q_norm)
        rotated = torch.cat((queries, self._normed_heads(joint[:, heads : heads + kv_heads], weights.k_norm)), 1)
        rotated = self._rotated(layer, rotated, position)
        keys, values = self._keys[layer], self._values[layer]
        own = self._where(table, position, until)
        keys[:, own] = rotated[:, heads:].transpose(0, 1).to(keys.dtype)
        values[:, own] = joint[:, heads + kv_heads :].transpose(0, 1).to(values.dtype)
        window = attention.windows[layer] if attention.windows else 0
        since = max(0, position + 1 - window) if window else 0
        seen = self._where(table, since, until)
        mixed = _attention(
            rotated[:, :heads].transpose(0, 1)[None].to(keys.dtype),
            keys[:, seen][None],
            values[:, seen][None],
            self._mask(tokens, position, since, window) if tokens > 1 else None,
            attention,
            weights.sinks,
        )
        return mixed[0].transpose(0, 1).reshape(tokens, -1)

    def add_attention(self, layer: int, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """The residual x [n, hidden] with the attention of `layer` added, what the feed-forward reads of it, and that
        normed, the input of its workers."""
        weights, parallel = self._layers[layer], self._model.spec.architecture.residual == "parallel"
        after = self._added(x, self._attend(layer, x, place), weights.attn_post_norm)
        read = x if parallel else after
        return after, read, self._normed(read, weights.ffn_norm)

    def add_feed_forward(self, layer: int, x: Tensor, output: Tensor, routing: Tensor | None) -> Tensor:
        """The residual x [n, hidden] with what the workers made of their input added; `routing` [n, branches]: the
        weights of the branches, None: there is one."""
        weights = self._layers[layer]
        bias = weights.down_bias
        if bias is not None:
            output = output + (bias if routing is None else routing.to(bias.device) @ bias)
        return self._added(x, output, weights.ffn_post_norm)

    def _added(self, x: Tensor, output: Tensor, norm: _Norm) -> Tensor:
        architecture = self._model.spec.architecture
        if architecture.norm.placement == "sum":
            return self._normed(x + output * architecture.residual_scale, norm)
        return x + self._normed(output, norm) * architecture.residual_scale

    def predict(self, layer: int, x: Tensor, normed: Tensor, used: Sequence[int]) -> Tensor:
        """Which neurons a token will fire, from the residual and the feed-forward input: int32 [groups], a bit each.

        `used`: the experts that it uses; in a model without experts, of its one predictor, 0.
        """
        weights, spec = self._layers[layer], self._model.spec
        fc1, fc2 = weights.fc1, weights.fc2
        assert fc1 is not None
        assert fc2 is not None
        bounds, rank = bounds_of(spec).tolist(), len(fc1) // predictors_of(spec)
        words = torch.zeros(bounds[-1], dtype=torch.int32, device=fc1.device)
        for number in used:
            branch = number if spec.architecture.feed_forward.experts is None else 1 + number
            low, high = bounds[branch], bounds[branch + 1]
            own = fc1[number * rank : (number + 1) * rank]
            inner = _linear(normed if self._predictor.input == "normed" else x, own, weights.fc1_bias)
            if self._predictor.activation == "relu":
                inner = inner.relu()
            logits = _linear(inner, fc2[low * GROUP : high * GROUP], weights.fc2_bias)
            fires = logits.view(-1, GROUP) > self._predictor.threshold
            words[low:high] = (fires.int() << self._bits).sum(1, dtype=torch.int32)
        return words

    def expert_scores(self, layer: int, read: Tensor) -> Tensor | None:
        """The scores of the experts for what their router reads [n, hidden]: float32 [n, rows of the router]; None for
        a layer without experts."""
        weights = self._layers[layer]
        return None if weights.router is None else _linear(read, weights.router, weights.router_bias)

    def head_input(self, x: Tensor) -> Tensor:
        """What the head gets of the residual x [n, hidden] behind the last layer."""
        return self._normed(x, self._norm)

    def logits(self, x: Tensor) -> Tensor:
        """Of the last token of x [n, hidden]: float32 [vocab]."""
        architecture = self._model.spec.architecture
        logits = _linear(self.head_input(x[-1:]), self._head, None)[0] * architecture.logit_scale
        return _capped(logits, architecture.logit_cap)

    def _normed(self, x: Tensor, norm: _Norm) -> Tensor:
        settings = self._model.spec.architecture.norm
        if norm.weight is None:
            return x
        if settings.kind == "layer":
            return layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, settings.epsilon)
        return rms_norm(x, (x.shape[-1],), norm.weight, settings.epsilon)

    def _normed_heads(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """The norm of queries or keys [n, heads, head_dim], over as many numbers as it has weights."""
        if weight is None:
            return rows
        vectors = rows.reshape(len(rows), -1, len(weight))
        return rms_norm(vectors, (len(weight),), weight, self._model.spec.architecture.norm.epsilon).view(rows.shape)

    def _rotated(self, layer: int, rows: Tensor, position: int) -> Tensor:
        """RoPE on rows [n, heads, head_dim], in which the two numbers of a pair are neighbours."""
        positions = self._model.spec.architecture.positions
        table = positions.table_of(layer)
        if table < 0:
            return rows
        dim = positions.rotary[table].dim
        cos, sin = self._rotary[table, :, position : position + len(rows), None, : dim // 2]
        even, odd = rows[..., 0:dim:2], rows[..., 1:dim:2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((turned, rows[..., dim:]), dim=-1)

    def _mask(self, tokens: int, position: int, since: int, window: int) -> Tensor:
        """Which positions each token attends to, those up to its own, in a window: bool [n, position + n - since]."""
        own = torch.arange(position, position + tokens, device=self._device)[:, None]
        others = torch.arange(since, position + tokens, device=self._device)
        return (own >= others) & (own - others < window) if window else own >= others


def _norm(have: dict[str, Tensor], name: str) -> _Norm:
    return _Norm(have.get(name), have.get(f"{name}.bias"))


def _capped(values: Tensor, cap: float | None) -> Tensor:
    return values if cap is None else cap * torch.tanh(values / cap)


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, attention: Attention, sinks: Tensor | None
) -> Tensor:
    """Of queries [1, heads, n, head_dim] to keys and values [1, kv_heads, positions, head_dim]; `sinks` [heads]."""
    if attention.soft_cap is None and sinks is None:
        grouped = attention.heads != attention.kv_heads
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=attention.score_scale, enable_gqa=grouped
        )
    keys, values = (part.repeat_interleave(attention.heads // attention.kv_heads, dim=1) for part in (keys, values))
    scores = _capped((queries @ keys.mT).float() * attention.score_scale, attention.soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sunk = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, sunk), -1).softmax(-1)[..., :-1].to(values.dtype) @ values
    return scores.softmax(-1).to(values.dtype) @ values


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 x [n, cols] times weight [rows, cols], plus bias: float32 [n, rows]."""
    product = (x.to(weight.dtype) @ weight.T).float()
    return product if bias is None else product + bias
