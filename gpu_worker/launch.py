"""How `ffn.cu` and `prefill.cu` are compiled and launched for a model: macros, grids, sizes of buffers. No CUDA here.

The workspace is one block of device memory, each part on a 256-byte boundary:

    ids    i32 [max_groups]                   `.
    mask   u32 [max_groups]                     | one copy to the device
    x      f32 [max_tokens, hidden]            -'
    passed u8  [max_groups * 32 * max_tokens] `-. one copy back; `passed` is used at its end, so that `out` follows
    out    f32 [max_tokens, hidden]            -'
    h      f32 [max_tokens, max_groups * 32]

Vectors of several tokens may be in panels of 16 instead: so `max_tokens` counts whole panels.
"""

from importlib.resources import files
from typing import NamedTuple

from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import BLOCK
from warmfront.shared.model.panels import whole_panels

__all__ = [
    "THREADS",
    "Grids",
    "ManyGrids",
    "Workspace",
    "grids",
    "many_grids",
    "options",
    "partial_rows",
    "source",
    "workspace",
]

Grid = tuple[int, int, int]

# As in ffn.cu.
_WARPS = 8
_UNIT = 8
THREADS = 32 * _WARPS
# As in prefill.cu: columns of a block of `down_many`, tokens of a block and of a thread at most.
_COLUMNS = 64
_MAX_PER = 4
# Blocks of `down` and `down_many` at most: about four for each multiprocessor of the largest cards. A constant, not the
# card's count: the order of the sums, and so the result's bits, must not depend on the card.
_DOWN_BLOCKS = 512
_ALIGNMENT = 256


class Grids(NamedTuple):
    """Blocks of `THREADS` threads for each kernel."""

    gate_up: Grid
    down: Grid
    # Needed only if `segments` > 1.
    reduce: Grid
    # Parts of the groups that `down` adds up apart from each other.
    segments: int


class ManyGrids(NamedTuple):
    """The same for several tokens at once."""

    gate_up: Grid
    down: Grid
    reduce: Grid
    segments: int
    # Tokens of a thread; a block has 32 times as many.
    per: int


class Workspace(NamedTuple):
    """Offsets in bytes, and the total."""

    ids: int
    mask: int
    x: int
    passed: int
    out: int
    h: int
    total: int


def source() -> str:
    """The kernels."""
    folder = files("warmfront.gpu_worker")
    return "\n".join(folder.joinpath(name).read_text("utf-8") for name in ("ffn.cu", "prefill.cu"))


def options(layout: BundleLayout, feed_forward: FeedForward) -> tuple[str, ...]:
    """Compiler options that fit the kernels to a model."""
    macros = {
        "HIDDEN": layout.hidden,
        "GATE_KIND": layout.gate_kind.name,
        "DOWN_KIND": layout.down_kind.name,
        "ACTIVATION": feed_forward.activation.upper(),
        "CLOSED": f"{feed_forward.closed.hex()}f",
        "LIMIT": f"{(feed_forward.limit or 0.0).hex()}f",
        "GATED": int(layout.gated),
        "UP_OFFSET": layout.up_offset,
        "GATE_BIAS": layout.gate_bias_offset,
        "UP_BIAS": layout.up_bias_offset,
        "DOWN_OFFSET": layout.down_offset,
        "BUNDLE_BYTES": layout.bundle_bytes,
        "GROUP_BYTES": layout.group_bytes,
        "TAIL_OFFSET": layout.tail_offset,
    }
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in macros.items()))


def grids(layout: BundleLayout, groups: int, tokens: int) -> Grids:
    """The launch of `groups` >= 1 groups for `tokens` >= 1 tokens."""
    segments = min(-(-groups // _WARPS), _max_segments(layout, tokens))
    return Grids(
        gate_up=(-(-groups * GROUP * tokens // _WARPS), 1, 1),
        down=(_tiles(layout), segments, tokens),
        reduce=(-(-tokens * layout.hidden // THREADS), 1, 1),
        segments=segments,
    )


def many_grids(layout: BundleLayout, groups: int, tokens: int) -> ManyGrids:
    """The launch of `groups` >= 1 whole groups for `tokens` >= 1 tokens at once."""
    tiles, per = _token_tiles(tokens)
    segments = min(groups, _max_many_segments(layout, tokens))
    return ManyGrids(
        gate_up=(groups, tiles, 1),
        down=(-(-layout.hidden // _COLUMNS), segments, tiles),
        reduce=(-(-whole_panels(tokens) * layout.hidden // THREADS), 1, 1),
        segments=segments,
        per=per,
    )


def partial_rows(layout: BundleLayout, max_tokens: int) -> int:
    """Rows [hidden] of partial sums that any launch of up to `max_tokens` tokens may need."""
    several = (
        (max_segments(layout, tokens), whole_panels(tokens))
        for tokens in range(1, max_tokens + 1)
        for max_segments in (_max_segments, _max_many_segments)
    )
    return max((segments * tokens for segments, tokens in several if segments > 1), default=0)


def workspace(layout: BundleLayout, max_groups: int, max_tokens: int) -> Workspace:
    """Where the parts of the workspace lie for launches of up to `max_groups` groups."""
    tokens = whole_panels(max_tokens)
    row = 4 * tokens * layout.hidden
    pairs = max_groups * GROUP * tokens
    sizes = (4 * max_groups, 4 * max_groups, row, pairs, row, 4 * pairs)
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return Workspace(*offsets)


def _tiles(layout: BundleLayout) -> int:
    return -(-layout.hidden // (BLOCK * _UNIT))


def _max_segments(layout: BundleLayout, tokens: int) -> int:
    return max(1, _DOWN_BLOCKS // (_tiles(layout) * tokens))


def _token_tiles(tokens: int) -> tuple[int, int]:
    """Blocks that share the tokens, and tokens of each of their threads: 288 are 3 x 32 x 3."""
    tiles = -(-tokens // (32 * _MAX_PER))
    return tiles, -(-tokens // (32 * tiles))


def _max_many_segments(layout: BundleLayout, tokens: int) -> int:
    return max(1, _DOWN_BLOCKS // (-(-layout.hidden // _COLUMNS) * _token_tiles(tokens)[0]))
