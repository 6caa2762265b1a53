"""The tensors of a model: their names in this program, for every file format, and their shapes as published.

embed                          [vocab, hidden]
head                           [vocab, hidden], absent when it is the embedding
norm                           [hidden]
layers.{i}.attn_norm, .ffn_norm                        [hidden]
layers.{i}.q, .k, .v           [heads or kv_heads * head_dim, hidden]
layers.{i}.q_norm, .k_norm     [head_dim], with q/k norm
layers.{i}.o                   [hidden, heads * head_dim]
layers.{i}.gate, .up           [ffn, hidden]; no gate where the feed-forward has none
layers.{i}.down                [hidden, ffn]
layers.{i}.fc1                 [r, hidden], if the model has predictors; r may differ between layers
layers.{i}.fc2                 [ffn, r], likewise
{any of these}.bias            [out], when the model has it
"""

from collections.abc import Iterator, Mapping

from warmfront.shared.model.spec import ModelSpec

__all__ = ["file_shapes", "predictor_shapes"]

Shape = tuple[int, ...]


def file_shapes(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of the model but its predictors'."""
    hidden, norm_bias = spec.hidden, spec.architecture.norm.bias
    yield "embed", (spec.vocab, hidden)
    if not spec.architecture.tied_head:
        yield "head", (spec.vocab, hidden)
    yield from _with_bias("norm", (hidden,), norm_bias)
    attention, feed_forward = spec.architecture.attention, spec.architecture.feed_forward
    heads = {"q": (attention.q_rows, hidden), "k": (attention.kv_rows, hidden), "v": (attention.kv_rows, hidden)}
    shapes = heads | {"o": (hidden, attention.q_rows)}
    neurons = {"gate": (spec.ffn, hidden), "up": (spec.ffn, hidden), "down": (hidden, spec.ffn)}
    for i in range(spec.layers):
        yield from _with_bias(f"layers.{i}.attn_norm", (hidden,), norm_bias)
        for part, shape in shapes.items():
            yield from _with_bias(f"layers.{i}.{part}", shape, part in attention.biases)
        if attention.qk_norm:
            yield f"layers.{i}.q_norm", (attention.head_dim,)
            yield f"layers.{i}.k_norm", (attention.head_dim,)
        yield from _with_bias(f"layers.{i}.ffn_norm", (hidden,), norm_bias)
        for part in feed_forward.matrices:
            yield from _with_bias(f"layers.{i}.{part}", neurons[part], part in feed_forward.biases)


def _with_bias(name: str, shape: Shape, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield name, shape
    if bias:
        yield f"{name}.bias", shape[:1]


def predictor_shapes(spec: ModelSpec, have: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Name and shape of the predictors' matrices, where r is as many as each fc1 of `have` has rows, 1 at least."""
    for i in range(spec.layers):
        rank = max((have.get(f"layers.{i}.fc1") or (1,))[0], 1)
        yield f"layers.{i}.fc1", (rank, spec.hidden)
        yield f"layers.{i}.fc2", (spec.ffn, rank)
