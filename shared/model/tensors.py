"""The tensors of a model: their names in this program, for every file format, and their shapes as published.

embed                          [vocab, hidden]
head                           [vocab, hidden], absent when it is the embedding
positions                      [offset + context, hidden], where positions are learned
norm                           [hidden], where there is one before the head
layers.{i}.attn_norm, .ffn_norm                        [hidden]; absent where blocks are normed behind their input only;
                                                       no ffn_norm where attn_norm is that of both
layers.{i}.attn_post_norm, .ffn_post_norm              [hidden], where blocks are normed at their output, or behind it
layers.{i}.q, .k, .v           [heads or kv_heads * head_dim, hidden]
layers.{i}.q_norm, .k_norm     [head_dim] or, of whole vectors, [heads or kv_heads * head_dim], with q/k norm
layers.{i}.o                   [hidden, heads * head_dim]
layers.{i}.sinks               [heads], where attention has them
layers.{i}.gate, .up           [ffn, hidden]; no gate where the feed-forward has none
layers.{i}.down                [hidden, ffn]
layers.{i}.experts.{e}.gate, .up, .down    the same of an expert, instead; not in layers without experts
layers.{i}.shared.gate, .up, .down         the same of the expert that all tokens use, where there is one
layers.{i}.router              [experts, hidden], with experts
layers.{i}.correction.bias     [experts], what the choice of experts adds to their weights, where it does
layers.{i}.shared_router       [1, hidden], where the shared expert has a gate
layers.{i}.fc1                 [r, hidden], if the model has predictors; r may differ between layers
layers.{i}.fc2                 [ffn, r], likewise
layers.{i}.experts.{e}.fc1, .fc2           the same of an expert, instead
layers.{i}.fc1.bias, .fc2.bias [r], [ffn], if the predictors have them
{any of these}.bias            [out], when the model has it
"""

from collections.abc import Iterator, Mapping
from itertools import chain

from warmfront.shared.model.branches import has_experts, parts_of
from warmfront.shared.model.spec import ModelSpec

__all__ = ["file_shapes", "layer_shapes", "predictor_shapes", "top_shapes"]

Shape = tuple[int, ...]


def top_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of each tensor outside the layers."""
    architecture = spec.architecture
    shapes: dict[str, Shape] = {"embed": (spec.vocab, spec.hidden)}
    if not architecture.tied_head:
        shapes["head"] = (spec.vocab, spec.hidden)
    if architecture.positions.learned_offset is not None:
        shapes["positions"] = (architecture.positions.learned_offset + spec.context, spec.hidden)
    if architecture.norm.final:
        shapes |= _with_bias("norm", (spec.hidden,), architecture.norm.bias)
    return shapes


def layer_shapes(spec: ModelSpec, layer: int | None = None) -> dict[str, Shape]:
    """Shape of each tensor of a layer but its predictor's and its experts', by the name without "layers.{i}.".

    `layer`: which one, where those of a mixture without experts are told apart from the others.
    """
    hidden, norm = spec.hidden, spec.architecture.norm
    attention, feed_forward = spec.architecture.attention, spec.architecture.feed_forward
    rows = {"q": attention.q_rows, "k": attention.kv_rows, "v": attention.kv_rows}
    cols = {"o": attention.q_rows}
    before = _with_bias("norm", (hidden,), norm.bias) if norm.placement in ("pre", "sandwich") else {}
    behind = _with_bias("post_norm", (hidden,), norm.bias) if norm.placement != "pre" else {}
    shapes = {f"attn_{part}": shape for part, shape in before.items()}
    for part in ("q", "k", "v", "o"):
        shapes |= _with_bias(part, (rows.get(part, hidden), cols.get(part, hidden)), part in attention.biases)
    if attention.sinks:
        shapes["sinks"] = (attention.heads,)
    if attention.qk_norm == "head":
        shapes |= {"q_norm": (attention.head_dim,), "k_norm": (attention.head_dim,)}
    elif attention.qk_norm == "whole":
        shapes |= {"q_norm": (attention.q_rows,), "k_norm": (attention.kv_rows,)}
    shapes |= {f"attn_{part}": shape for part, shape in behind.items()}
    if not norm.shared:
        shapes |= {f"ffn_{part}": shape for part, shape in before.items()}
    experts = feed_forward.experts
    if experts is None or layer in experts.dense_layers:
        neurons = spec.ffn if experts is None else experts.dense
        for part in feed_forward.matrices:
            shapes |= _with_bias(part, _matrix_shape(part, neurons, hidden), part in feed_forward.biases)
    else:
        shapes |= _with_bias("router", (experts.number, hidden), experts.bias)
        if experts.corrected:
            shapes["correction.bias"] = (experts.number,)
        if experts.shared_gate:
            shapes["shared_router"] = (1, hidden)
    return shapes | {f"ffn_{part}": shape for part, shape in behind.items()}


def _matrix_shape(part: str, neurons: int, hidden: int) -> Shape:
    return (hidden, neurons) if part == "down" else (neurons, hidden)


def _expert_shapes(spec: ModelSpec, layer: int) -> Iterator[tuple[str, Shape]]:
    """The same of a layer's experts; nothing for one without."""
    feed_forward = spec.architecture.feed_forward
    for branch in parts_of(spec, layer) if has_experts(spec, layer) else ():
        for part in feed_forward.matrices:
            shape = _matrix_shape(part, branch.neurons, spec.hidden)
            yield from _with_bias(branch.prefix + part, shape, part in feed_forward.biases).items()


def _with_bias(name: str, shape: Shape, bias: bool) -> dict[str, Shape]:
    return {name: shape, f"{name}.bias": shape[:1]} if bias else {name: shape}


def file_shapes(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor but the predictors'; lazily, as a hostile file may claim any number of layers."""
    yield from top_shapes(spec).items()
    for i in range(spec.layers):
        for part, shape in chain(layer_shapes(spec, i).items(), _expert_shapes(spec, i)):
            yield f"layers.{i}.{part}", shape


def predictor_shapes(spec: ModelSpec, have: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Name and shape of the predictors' tensors, where r is as many as each fc1 of `have` has rows, 1 at least."""
    biases = spec.predictor.biases if spec.predictor is not None else ()
    for i in range(spec.layers):
        prefixes = [f"layers.{i}.{branch.prefix}" for branch in parts_of(spec, i)]
        # That of one expert is that of all.
        rank = max((have.get(f"{prefixes[0]}fc1") or (1,))[0], 1)
        for prefix in prefixes:
            for part, rows, cols in (("fc1", rank, spec.hidden), ("fc2", spec.ffn, rank)):
                yield f"{prefix}{part}", (rows, cols)
                if part in biases:
                    yield f"{prefix}{part}.bias", (rows,)
