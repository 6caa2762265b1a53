"""Grids and buffers of the kernels.  pytest tests/gpu_worker/test_launch.py"""

import pytest

from warmfront.gpu_worker import launch
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind


@pytest.mark.parametrize("hidden", [96, 576, 4096])
def test_buffers_cover_every_launch(hidden: int) -> None:
    """The buffers are sized for the largest launch, the grids for each."""
    layout = BundleLayout(hidden=hidden, ffn=3 * hidden, gate_kind=Kind.F16, down_kind=Kind.F16)
    launches = [(groups, tokens) for groups in range(1, layout.groups + 1, 7) for tokens in range(1, 130, 4)]
    rows = launch.partial_rows(layout, 129)
    for groups, tokens in launches:
        grids = launch.grids(layout, groups, tokens)
        tiles, segments, _ = grids.down
        assert tiles * 256 >= hidden
        assert grids.gate_up[0] * 8 >= groups * 32 * tokens
        assert grids.reduce[0] * 256 >= tokens * hidden
        assert segments == 1 or segments * tokens <= rows
        many = launch.many_grids(layout, groups, tokens)
        columns, segments, tiles = many.down
        assert columns * 64 >= hidden
        assert many.gate_up == (groups, tiles, 1)
        assert 1 <= many.per <= 4
        assert tiles * 32 * many.per >= tokens
        padded = -(-tokens // 16) * 16
        assert many.reduce[0] * 256 >= padded * hidden
        assert 1 <= segments == many.segments <= groups
        assert segments == 1 or segments * padded <= rows
    at = launch.workspace(layout, layout.groups, 129)
    pairs = 144 * layout.groups * 32
    sizes = (4 * layout.groups, 4 * layout.groups, 4 * 144 * hidden, pairs, 4 * 144 * hidden, 4 * pairs)
    assert all(start % 256 == 0 and start + size <= end for start, size, end in zip(at, sizes, at[1:], strict=False))
