"""What the compiled pass works on: the model's sizes and weights, and the state of the team that runs it."""

from typing import Any, NamedTuple

__all__ = ["POSITION", "ROLES", "SEQUENCE", "TOKENS", "WANT_LOGITS", "Network", "State"]

# Columns of Network.weights and Network.kinds.
ROLES = ("attn_norm", "q", "k", "v", "o", "ffn_norm", "q.bias", "k.bias", "v.bias", "o.bias")
ATTN_NORM, Q, K, V, OUT, FFN_NORM, Q_BIAS, K_BIAS, V_BIAS, OUT_BIAS = range(len(ROLES))
# Words of State.job.
TOKENS, POSITION, WANT_LOGITS, SEQUENCE = range(4)


class Network(NamedTuple):
    """Sizes and weights: int and float32 scalars, and int64 [layers, roles] addresses and weight types."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: Any
    score_scale: Any
    weights: Any
    kinds: Any
    embed: int
    embed_kind: int
    head: int
    head_kind: int
    norm: int
    # float32 [context, head_dim / 2]
    cos: Any
    sin: Any


class State(NamedTuple):
    """What a team works on. `*_at` are addresses, the rest arrays.

    x, h: float32 [members, max_tokens * hidden], one row a thread; qkv, att, proj: float32, shared by the team;
    scores, chances: float32 [members, n]; scratch: float32, prepared: uint8 [members, n]; tokens: int64 [max_tokens];
    keys_at, values_at: [layers, kv_heads, context, head_dim padded to 32] of `cache_kind`.
    """

    members: int
    job: Any
    tokens: Any
    status: Any
    x: Any
    h: Any
    qkv: Any
    att: Any
    proj: Any
    scores: Any
    chances: Any
    scratch: Any
    prepared: Any
    logits: Any
    keys_at: int
    values_at: int
    cache_kind: int
    context: int
    # Handoff: the team's own lines, then the board's.
    go_at: int
    finished_at: int
    barrier_at: int
    abort_at: int
    job_at: int
    order: Any
    board_x: Any
    # int64 [workers]: addresses of the done line and of y of each.
    done_at: Any
    y_at: Any
    barrier_spins: int
    worker_spins: int
