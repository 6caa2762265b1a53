"""What the compiled pass works on: the model's sizes and weights, and the state of the team that runs it."""

from typing import Any, NamedTuple

__all__ = [
    "CAPTURE",
    "LOST",
    "MEASURE",
    "POSITION",
    "POSTED",
    "ROLES",
    "SEQUENCE",
    "SPOILED",
    "STEPS",
    "TOKENS",
    "WANT_LOGITS",
    "Network",
    "State",
]

# Columns of Network.weights and Network.kinds.
ROLES = ("attn_norm", "q", "k", "v", "o", "ffn_norm", "q.bias", "k.bias", "v.bias", "o.bias", "fc1", "fc2", "lowbit")
ATTN_NORM, Q, K, V, OUT, FFN_NORM, Q_BIAS, K_BIAS, V_BIAS, OUT_BIAS, FC1, FC2, LOWBIT = range(len(ROLES))
# Words of State.job. Sequence numbers on the board: SEQUENCE before the job, POSTED so far. SPOILED: not 0 once the job
# has written a key or value that is not finite.
TOKENS, POSITION, WANT_LOGITS, SEQUENCE, MEASURE, CAPTURE, POSTED, SPOILED = range(8)
# What a job of the team ends with beside the results of a wait (`shared/wire/handoff.py`): a worker has died.
LOST = 3
# Columns of State.times: when the team's first thread was done with each part of a layer.
STEPS = ("start", "qkv", "attention", "output", "predictor", "post", "merge")


class Network(NamedTuple):
    """Sizes and weights: int and float32 scalars, and int64 [layers, roles] addresses and weight types.

    The kind of a low-bit copy is its number of bits.
    """

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
    # Prediction: whether there is any, and whether a layer ahead; ranks: int64 [layers]; thresholds: float32 [layers,
    # neurons]; 0: low-rank.
    predicts: bool
    ahead: bool
    groups: int
    normed: bool
    rectified: bool
    ranks: Any
    thresholds: Any
    lowbit_stride: int


class State(NamedTuple):
    """What a team works on. `*_at` are addresses, the rest arrays.

    cuts, busy: see `RowSplit`; x, h: float32 [members, max_tokens * hidden], one row a thread; qkv, att, proj: float32,
    shared by the team;
    scores, chances: float32 [members, n]; scratch: float32, prepared: uint8 [members, n]; tokens: int64 [max_tokens];
    keys_at, values_at: [layers, kv_heads, context, head_dim padded to 32] of `cache_kind`. Attention to one token is
    split into `chunks` of the positions: partial [chunks, heads * head_dim], tops and totals [chunks, heads]. inner:
    float32 [rank]; mask: uint32 [layers, groups] on the board; captured: float32 [layers, max_tokens * hidden] or
    empty; times: int64 [layers, STEPS] and spans: int64 [layers, workers, 2], ns on the monotonic clock.
    """

    members: int
    cuts: Any
    busy: Any
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
    chunks: int
    partial: Any
    tops: Any
    totals: Any
    scratch: Any
    prepared: Any
    logits: Any
    inner: Any
    captured: Any
    times: Any
    spans: Any
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
    mask: Any
    # int64 [workers]: whether it takes part; addresses of the done line, the word that it is dead, the record and y.
    present: Any
    done_at: Any
    gone_at: Any
    record_at: Any
    y_at: Any
    barrier_spins: int
    worker_spins: int
