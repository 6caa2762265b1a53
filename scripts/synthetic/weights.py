"""The weights of the synthetic model. What makes it sparse is told in `make_synthetic_model.py`."""

import math
from collections.abc import Generator, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import relu, scaled_dot_product_attention, silu

from synthetic.shape import FIRST_WORD, NORM_EPS, ROPE_BASE, Shape

__all__ = ["Maker"]

ATTENTION_SHARPNESS = 1.5  # standard deviation of queries and keys: attention picks out a few tokens
SAMPLES, SAMPLE_LENGTH = 16, 64

# Keys of the random streams, one of each kind for a layer: no tensor's numbers depend on the shape of another.
EMBED, WORDS, TOPIC, TEXTS, QUERY, KEY, VALUE, OUTPUT, BASIS, MIX, RATES, UP, DOWN, SCORES = range(14)


class Maker:
    """Makes the tensors one after another, and runs sample texts through the layers to set the biases of the gates."""

    def __init__(
        self, shape: Shape, rates: npt.NDArray[np.float64], uses: npt.NDArray[np.float64], seed: int, dtype: torch.dtype
    ) -> None:
        """`rates`: how often each neuron of a layer fires, from 0 to 1; `uses`: how often each expert is used instead.

        They are shuffled for each layer. `firing` tells by layer what part of the neurons fires, or of the choices of
        experts falls on the most used tenth.
        """
        self.shape = shape
        self.seed = seed
        self.dtype = dtype
        self.rates = rates
        self.uses = uses
        self.bias = math.sqrt(shape.hidden) / 4  # of channel 0; the other channels have a mean square of one
        # All layers together add a mean square of one, and less where few channels must carry the word.
        self.step = math.sqrt(min(1.0, shape.hidden / 256) / (2 * shape.layers))
        self.firing: list[float] = []
        self._topics = self._directions()
        self._cycles = self._words()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values in the order of `Shape.tensors`: float32 values that `dtype` can hold exactly."""
        x = yield from self._embeddings()
        for layer in range(self.shape.layers):
            for part, values in self._layer(layer, x):
                yield f"layers.{layer}.{part}", values
        yield "norm", torch.ones(self.shape.hidden)

    def texts(self) -> Tensor:
        """Token ids of sample texts, int64 [text, position]: walks along the cycles, the topics taking turns."""
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
        """A unit vector for each topic, in the few dimensions that the P of all layers share; zero in channel 0."""
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
        """A random cycle through the words of each topic."""
        topics = self.shape.topics
        rng = self._rng(WORDS)
        return [rng.permutation(np.arange(FIRST_WORD + k, self.shape.vocab, topics)) for k in range(topics)]

    def _embeddings(self) -> Generator[tuple[str, Tensor], None, Tensor]:
        """Embedding and head; returns the residual stream of the sample texts, [text, position, channel]."""
        shape = self.shape
        values = self._normal(shape.vocab, shape.hidden, EMBED)
        # Bytes and special tokens look like some word each.
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

        # A word is predicted by the embedding of the one before it on its cycle.
        before = torch.zeros(shape.vocab, dtype=torch.int64)
        for cycle in self._cycles:
            before[torch.from_numpy(cycle)] = torch.from_numpy(np.roll(cycle, 1))
        head = values[before].mul_(shape.logit / shape.hidden)
        del values
        head[:FIRST_WORD] = 0.0
        yield "head", self._round(head)
        return x

    def _layer(self, layer: int, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The layer's tensors; `x` is replaced by the residual stream behind the layer."""
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
        if self.shape.experts:
            yield from self._mixture(layer, p, x)
            return
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

    def _mixture(self, layer: int, p: Tensor, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Router and experts of a layer; `x` is replaced by the residual stream behind it.

        A row of the router is like that of a gate, U P - b e0, and positive as often as its expert is to be used.
        """
        hidden, ffn, rank, count = self.shape.hidden, self.shape.ffn, self.shape.rank, self.shape.experts
        usual, flat = 1 / math.sqrt(hidden), x.flatten(0, 1)
        u = self._normal(count, rank, SCORES, layer, scale=1 / math.sqrt(rank))
        rates = torch.from_numpy(self._rng(RATES, layer).permutation(self.uses).astype(np.float32))
        router = u @ p
        router[:, 0] = -quantiles((flat @ p.T @ u.T).div_(self.bias), 1 - rates)
        router = self._round(router)
        h = normed(flat)
        # Scores that differ by some units, so that the first of those used has about half of the weight.
        best = (h @ router.T).topk(self.shape.used)
        weights = best.values.softmax(1)
        uses = torch.bincount(best.indices.flatten(), minlength=count).float()
        self.firing.append(float(uses.sort(descending=True).values[: max(1, count // 10)].sum() / uses.sum()))
        yield "router", router
        activation = relu if self.shape.expert_activation == "relu" else silu
        users = [(best.indices == number).nonzero(as_tuple=True) for number in range(count)]
        inners = []
        for number, (tokens, _) in enumerate(users):
            gate = self._normal(ffn, hidden, MIX, layer, number, scale=usual)
            if self.shape.expert_activation == "relu":
                gate[:, 0] = 0.0
                own = torch.from_numpy(self._rng(RATES, layer, number).permutation(self.rates).astype(np.float32))
                gate[:, 0] = -quantiles((flat @ gate.T).div_(self.bias), 1 - own)
            gate = self._round(gate)
            inners.append(activation(h[tokens] @ gate.T))
            yield f"experts.{number}.gate", gate
        for number, (tokens, _) in enumerate(users):
            up = self._round(self._normal(ffn, hidden, UP, layer, number, scale=usual))
            inners[number] *= h[tokens] @ up.T
            yield f"experts.{number}.up", up
        for number, (tokens, ranks) in enumerate(users):
            # An expert that the sample texts do not use is scaled as if its neurons were like others'.
            sample = inners[number] if len(tokens) else torch.full((1, ffn), 0.5)
            down = self._output(self._normal(hidden, ffn, DOWN, layer, number), sample)
            flat.index_add_(0, tokens, inners[number] @ down.T * weights[tokens, ranks, None])
            yield f"experts.{number}.down", down

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over the sample texts; all [text, position, channel]."""
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
        """`values` scaled so that its product with `inner` has a mean square of step ** 2; none of it in channel 0."""
        size = float(inner.square().sum(-1).mean().sqrt())
        values.mul_(self.step / max(size, 1e-6))
        values[0] = 0.0
        return self._round(values)

    def _basis(self, layer: int) -> Tensor:
        """P of a layer: orthonormal rows whose span holds the directions of the topics."""
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
    """The quantile of each column of `values` at its own level, interpolated."""
    values = values.sort(dim=0).values
    at = levels * (len(values) - 1)
    low = at.long().clamp(0, len(values) - 2)
    below, above = (values.gather(0, (low + i)[None])[0] for i in (0, 1))
    return torch.lerp(below, above, at - low)
