"""What the compiled pass works on: the model's sizes and weights, and the state of the team that runs it."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the engine imports this before numba
    from warmfront.shared.wire.handoff import Barrier

__all__ = [
    "ATTN_NORM",
    "ATTN_POST_NORM",
    "BIAS",
    "CAPTURE",
    "COMPARE",
    "CORRECTION",
    "DECODE",
    "DOWN_BIAS",
    "FC1",
    "FC1_BIAS",
    "FC2",
    "FFN_NORM",
    "FFN_POST_NORM",
    "K_NORM",
    "LOST",
    "LOWBIT",
    "OUT",
    "POSITION",
    "POSTED",
    "Q_NORM",
    "ROLES",
    "ROUTER",
    "ROUTER_BIAS",
    "SEQUENCE",
    "SINKS",
    "STEPS",
    "TOKENS",
    "WANT_LOGITS",
    "WORKER_PATIENCE_NS",
    "Cache",
    "Handoff",
    "K",
    "Network",
    "Parts",
    "Q",
    "Router",
    "State",
    "V",
]

# Columns of Network.weights and Network.kinds.
_BIASED = ("attn_norm", "q", "k", "v", "o", "attn_post_norm", "ffn_norm", "ffn_post_norm")
_REST = (
    *("q_norm", "k_norm", "fc1", "fc1.bias", "fc2", "lowbit", "down.bias"),
    *("router", "router.bias", "correction.bias", "sinks"),
)
ATTN_NORM, Q, K, V, OUT, ATTN_POST_NORM, FFN_NORM, FFN_POST_NORM = range(len(_BIASED))
# How many columns behind a matrix or a norm its bias is.
BIAS = len(_BIASED)
ROLES = (*_BIASED, *(f"{part}.bias" for part in _BIASED), *_REST)
Q_NORM, K_NORM, FC1, FC1_BIAS, FC2, LOWBIT, DOWN_BIAS, ROUTER, ROUTER_BIAS, CORRECTION, SINKS = range(
    2 * BIAS, len(ROLES)
)
# Words of State.job; the engine's thread writes them before it announces the job, but for POSTED.
(
    TOKENS,
    # Of a prompt's first token.
    POSITION,
    WANT_LOGITS,
    # Sequence number on the board before the job.
    SEQUENCE,
    # The workers are to compare the selection with the truth.
    COMPARE,
    # Keep the feed-forward inputs.
    CAPTURE,
    # Sequence number on the board that was last announced; by the first thread.
    POSTED,
    # The tokens are a batch of decoded ones, each computed as if it came alone; else a prompt's, in panels.
    DECODE,
) = range(8)
# What a job of the team ends with beside the results of a wait (`shared/wire/handoff.py`): a worker has died.
LOST = 3
# A worker that takes longer than this for one layer is taken for lost.
WORKER_PATIENCE_NS = 120_000_000_000
# Columns of State.times: when the team's first thread was done with each part of a layer.
STEPS = ("start", "qkv", "attention", "output", "predictor", "post", "merge")


class Parts(NamedTuple):
    """Addresses of the parts of the pass that are compiled apart (`shared/kernels/by_address/`), 0 if the run has none.

    Each takes (net, st, layer, rank), all of the team take part, and it returns DONE or ABORTED.
    """

    # Attention of a batch of decoded tokens, and of a prompt's.
    attend_batch: int
    attend_panels: int
    normalise_heads: int
    # The choice of experts.
    route: int
    # The guess of neurons.
    predict: int


class Router(NamedTuple):
    """How the experts of a token are chosen: see `architecture.Experts`."""

    # 0: there are none.
    experts: int
    active: int
    # Index into `architecture.SCORINGS`.
    scoring: int
    normalised: bool
    scale: float
    groups: int
    active_groups: int
    # Whether the last branch is a shared expert with a gate, whose score comes behind those of the experts.
    shared_gate: bool
    # Whether it reads the layer's input.
    early: bool
    # The branches, the first ones, that every token uses of a layer without a router.
    dense: int
    # Of the packed matrix.
    rows: int
    # int64 [branches + 1]: see `branches.bounds_of`.
    bounds: Any


class Network(NamedTuple):
    """Sizes, addresses and kinds of the weights; never changes. Kinds are numbers of `formats.Kind`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    # Index into `architecture.NORMS`, and float32 epsilon of the norms.
    norm_kind: int
    norm_eps: Any
    # Whether the feed-forward reads the layer's input too, not what attention made of it; whether the norms of blocks
    # are of the residual that their output has been added to.
    parallel: bool
    norms_sum: bool
    # Whether q and k are normed, and whether as whole vectors.
    qk_norm: bool
    whole_qk_norm: bool
    # float32 scalars: factor on q.k, and what caps the scores (0: nothing); factors on the embedding, on what a block
    # adds to the residual, and on the logits, and what caps those.
    score_scale: Any
    score_cap: Any
    embedding_scale: Any
    residual_scale: Any
    logit_scale: Any
    logit_cap: Any
    # int64 [layers, ROLES]: addresses of the tensors, 0 where the model has none, and their kinds; the kind of a
    # low-bit copy is its number of bits.
    weights: Any
    kinds: Any
    # `fetching.Distances`: how far ahead rows are fetched.
    ahead: Any
    # Embedding [vocab, hidden]; learned positions, 0: none, how many there are and which is that of position 0; output
    # head, which may be the embedding, and the last norm with its bias, 0: none.
    embed: int
    embed_kind: int
    learned: int
    learned_kind: int
    learned_rows: int
    learned_offset: int
    head: int
    head_kind: int
    norm: int
    norm_bias: int
    # float32 [tables, 2, context, pairs]: cosines and sines of each position and rotated pair; int64 [layers] twice:
    # each layer's table, and how many pairs of a head it rotates.
    rotary: Any
    table: Any
    pairs: Any
    # int64 [layers]: how many tokens a token attends to, itself included; 0: all before it.
    windows: Any
    # Whether a selector predicts the neurons of decoded tokens, and whether it does so a layer ahead.
    predicts: bool
    look_ahead: bool
    router: Router
    # Groups of neurons of a layer.
    groups: int
    # float64 [layers], and a number for all of them: see `exact_sums.inverse_unit`. 1 where neurons have biases, else
    # 0: the magnitude of the feature that they are the weights of.
    reach: Any
    degree: int
    biased: int
    # Low-rank predictors: whether they take the normed input, and whether a ReLU is between their matrices.
    normed: bool
    rectified: bool
    # int64 [layers]: rows of their first matrix, of each expert's.
    ranks: Any
    # float32 [layers, 1 + n, neurons]: scores above the first select the neuron; the others, of a low-bit selector that
    # weighs neurons, are added to the products of their copies.
    thresholds: Any
    # `activation.Activation`.
    activation: Any
    # Bytes of a row of a low-bit copy.
    lowbit_stride: int


class Handoff(NamedTuple):
    """Where the team meets the engine's thread and the workers: the team's own lines, then the board's."""

    # Line by which the engine's thread announces a job, and by which the last thread says that it is done.
    go_at: int
    finished_at: int
    # The board's abort word and its job line.
    abort_at: int
    job_at: int
    # int64 [5] on the board: the job's descriptor; by the first thread.
    descriptor: Any
    # float32 [max_tokens * hidden] on the board: the input of the feed-forward layer; by the first thread.
    board_x: Any
    # float32 [max_tokens] on the board: 1 / unit of each token's sums; by the first thread.
    inverse: Any
    # uint32 [BATCH, layers, groups] on the board: the neurons predicted, of which each thread writes its groups; or
    # those of the branches that are used.
    mask: Any
    # uint8 [BATCH, layers, branches] on the board: which branches are used.
    uses: Any
    # float32 [max_tokens, branches] on the board: the weights of the branches; each thread writes its tokens.
    routing: Any
    # int64 [workers]: whether it takes part; changed by the coordinator between two jobs.
    present: Any
    # int64 [workers]: addresses of the done line, of the word that it is dead, of its record and of its part y.
    done_at: Any
    dead_at: Any
    record_at: Any
    y_at: Any
    # Rounds of spinning for a worker.
    spins: int


class Cache(NamedTuple):
    """The KV cache, laid out as `shared/model/kv_layout.py` says."""

    # Weight type.
    kind: int
    # Addresses of the first tiles.
    keys_at: int
    values_at: int
    tile_bytes: int
    layers: int
    # Of each head and layer, of all texts.
    pages: int
    # How many tiles ahead are fetched while one token attends, 0: none.
    ahead: int


class State(NamedTuple):
    """What a team works on; but where it is said otherwise, by a row for each thread, which writes its own."""

    # int64 [1]: the address of the product of a matrix, compiled apart since many parts of the pass call it.
    linear: Any
    # How the threads divide rows, and meet.
    threads: int
    # int64 [threads + 1], and int64 [threads, 16] in ns: see `RowSplit`.
    cuts: Any
    busy: Any
    barrier: "Barrier"
    handoff: Handoff
    # The job: int64 [16] words, int64 [max_tokens] ids; by the engine's thread. int64 [threads]: each thread's result.
    job: Any
    tokens: Any
    status: Any
    # int64 [BATCH], and [BATCH, pages of a context]: where each token of a batch stands in its text, and the pages that
    # hold it; a prompt's are in the first row. By the engine's thread.
    positions: Any
    tables: Any
    # int64 [max_tokens]: not 0 once a key or value of the token is not finite; by any thread.
    spoiled: Any
    # float32 [threads, max_tokens * hidden]: residual, which every thread keeps whole; and [threads, max_tokens *
    # widest]: what is fed to the next matrix.
    x: Any
    h: Any
    # float32, one for all, of which each thread writes its rows: [panels, heads + 2 * kv_heads, head_dim, lanes],
    # [panels, heads * head_dim, lanes], [panels, hidden, lanes].
    qkv: Any
    att: Any
    proj: Any
    # float32 [threads, n]: attention's scores, or a predictor's, and the same as pairs of bfloat16.
    scores: Any
    chances: Any
    # Attention of decoded tokens takes the positions in so many chunks: float32 [BATCH, chunks, heads * head_dim], and
    # [BATCH, chunks, heads] twice: the mix of the values, the highest score and the sum of the exponentials. One for
    # all.
    chunks: int
    partial: Any
    tops: Any
    totals: Any
    # float32 [threads, n]: widened rows and sums; uint8 [threads, n]: a matrix's input, quantised or as pairs.
    scratch: Any
    packed: Any
    # float32 [BATCH, vocab], and [predictors, BATCH, rank] inside predictors; one for all, each thread writes its rows.
    logits: Any
    inner: Any
    # float32 [panels, rows of the router, lanes]: scores of the experts; one for all, each thread writes its rows.
    expert_scores: Any
    # int64 [threads, layers, branches]: how many tokens have used each branch, of models with experts.
    uses: Any
    # float32 [layers, max_tokens * hidden], or empty: feed-forward inputs that were asked for; by the first thread.
    captured: Any
    # int64 [layers, STEPS] and [layers, workers, 2], ns on the monotonic clock; by the first thread.
    times: Any
    spans: Any
    cache: Cache
