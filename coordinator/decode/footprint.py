"""How much memory a run takes in the coordinator, beside the weights: what is allocated, and counted before it is.

Imports no compiled code: memory is checked before the workers are started, numba is imported beside them.
"""

from math import gcd, prod

from warmfront.shared.model.branches import router_rows
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.kv_layout import PAGE, TILE, pages_of, tile_bytes
from warmfront.shared.model.panels import BATCH, PRODUCT_FLOATS
from warmfront.shared.model.spec import ModelSpec

__all__ = ["SCORES", "attended_bytes", "cache_bytes", "chunks_of", "scratch_bytes", "scratch_shapes"]

# Scores of a query head that attention has at a time: of one token 4096 positions, of a panel of 16 tokens 256. They do
# not follow the caches: where a softmax is cut changes its last bits. 16 KB a head are in any second-level cache.
SCORES = 4096
# Panels of 16 tokens that attention takes at a time, or more if more query heads share a key-value head.
PANELS = 3


def cache_bytes(spec: ModelSpec, kind: Kind, context: int, texts: int = 1) -> int:
    """Bytes of the KV cache for so many texts of `context` tokens."""
    tiles = texts * pages_of(context) * (PAGE // TILE)
    per_head = tiles * tile_bytes(kind, spec.architecture.attention.head_dim)
    return 2 * spec.layers * spec.architecture.attention.kv_heads * per_head


def attended_bytes(spec: ModelSpec, kind: Kind, tokens: int) -> int:
    """Bytes of keys and values that a token reads which follows so many: in each layer what its window holds."""
    attention = spec.architecture.attention
    row = tile_bytes(kind, attention.head_dim) // TILE
    windows = attention.windows or (0,) * spec.layers
    return 2 * attention.kv_heads * row * sum(min(tokens, window or tokens) for window in windows)


def chunks_of(spec: ModelSpec, threads: int) -> int:
    """Into how many chunks the positions are split, so that the key-value heads divide evenly over the threads."""
    return threads // gcd(threads, spec.architecture.attention.kv_heads)


def scratch_shapes(spec: ModelSpec, threads: int, max_tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the float32 fields of `network.State` by name, for `threads` threads and jobs of `max_tokens`."""
    attention = spec.architecture.attention
    width = attention.q_rows
    widest = max(spec.hidden, width)
    scores = max(attention.heads // attention.kv_heads, PANELS) * SCORES
    chunks = chunks_of(spec, threads)
    return {
        "x": (threads, max_tokens * spec.hidden),
        "h": (threads, max_tokens * widest),
        "qkv": (max_tokens * (width + 2 * attention.kv_rows),),
        "att": (max_tokens * width,),
        "proj": (max_tokens * spec.hidden,),
        "scores": (threads, scores),
        "chances": (threads, scores // 2),
        "partial": (BATCH, chunks, width),
        "tops": (BATCH, chunks, attention.heads),
        "totals": (BATCH, chunks, attention.heads),
        "scratch": (threads, 8 * widest + PRODUCT_FLOATS),
        "expert_scores": (max_tokens * router_rows(spec),),
    }


def scratch_bytes(spec: ModelSpec, threads: int, max_tokens: int) -> int:
    """Bytes of all of them."""
    return 4 * sum(prod(shape) for shape in scratch_shapes(spec, threads, max_tokens).values())
