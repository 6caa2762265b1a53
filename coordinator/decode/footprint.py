"""How much memory a run takes in the coordinator, beside the weights: what is allocated, and counted before it is.

Imports no compiled code: memory is checked before the workers are started, numba is imported beside them.
"""

from math import gcd, prod

from warmfront.shared.model.formats import Kind
from warmfront.shared.model.panels import LANES
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.store import PackedModel

__all__ = ["cache_bytes", "cache_kind", "chunks_of", "head_bytes", "scratch_bytes", "scratch_shapes"]


def cache_kind(model: PackedModel) -> Kind:
    """Weight type of the cached keys and values: float32 for float32 models, else float16."""
    return Kind.F32 if model.entries["embed"].kind == Kind.F32 else Kind.F16


def head_bytes(model: PackedModel, context: int) -> int:
    """Bytes of one head's keys, or values, in one layer."""
    padded = -(-model.spec.architecture.attention.head_dim // 32) * 32
    return context * padded * (4 if cache_kind(model) == Kind.F32 else 2)


def cache_bytes(model: PackedModel, context: int) -> int:
    """Bytes of the KV cache for `context` tokens."""
    return 2 * model.spec.layers * model.spec.architecture.attention.kv_heads * head_bytes(model, context)


def chunks_of(spec: ModelSpec, threads: int) -> int:
    """Into how many chunks the positions are split, so that the key-value heads divide evenly over the threads."""
    return threads // gcd(threads, spec.architecture.attention.kv_heads)


def scratch_shapes(spec: ModelSpec, context: int, threads: int, max_tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the float32 fields of `network.State` by name, for `threads` threads and jobs of `max_tokens`."""
    attention = spec.architecture.attention
    width = attention.q_rows
    widest = max(spec.hidden, width)
    scores = attention.heads // attention.kv_heads * (context + LANES) * LANES
    chunks = chunks_of(spec, threads)
    return {
        "x": (threads, max_tokens * spec.hidden),
        "h": (threads, max_tokens * widest),
        "qkv": (max_tokens * (width + 2 * attention.kv_rows),),
        "att": (max_tokens * width,),
        "proj": (max_tokens * spec.hidden,),
        "scores": (threads, scores),
        "chances": (threads, scores // 2),
        "partial": (chunks, width),
        "tops": (chunks, attention.heads),
        "totals": (chunks, attention.heads),
        "scratch": (threads, 16 * widest),
    }


def scratch_bytes(spec: ModelSpec, context: int, threads: int, max_tokens: int) -> int:
    """Bytes of all of them."""
    return 4 * sum(prod(shape) for shape in scratch_shapes(spec, context, threads, max_tokens).values())
