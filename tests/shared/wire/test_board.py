"""The board byte by byte, and shared with a process.  pytest tests/shared/wire/test_board.py"""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from warmfront.shared.errors import ProtocolError
from warmfront.shared.machine.memory import address, create_shared, map_shared
from warmfront.shared.model.noted import Noted
from warmfront.shared.wire.board import Board, BoardSizes

# 15 owners, and 15 words of a table, are padded to 128 bytes; 16 times 15 words of masks, and the firing of one panel,
# 15 * 32 * 2, both 960 bytes, to 1024; the uses, 16 * 9 bytes, to 256; x is 4 * 32 * 16 = 2048 bytes, y twice as much;
# inverse, 4 * 16 bytes, is padded to 128, and routing, three times as many, to 256.
SIZES = BoardSizes(workers=2, layers=3, groups=5, hidden=32, max_tokens=16, noted=Noted.FIRING, branches=3)
X_AT = 512 + 128 + 1024 + 1024 + 256 + 1024
INVERSE_AT = X_AT + 2048
WORKER_BYTES = 128 + 128 + 128 + 128 + 1024 + 4096
TOTAL = INVERSE_AT + 128 + 256 + 2 * WORKER_BYTES


def board_of(sizes: BoardSizes = SIZES) -> Board:
    return Board.create(np.zeros(sizes.total, np.uint8), sizes)


def test_sizes_by_hand() -> None:
    assert TOTAL == 17664
    assert SIZES.x_at == X_AT == 3968
    assert SIZES.inverse_at == INVERSE_AT == 6016
    assert [SIZES.worker_at(index) for index in range(2)] == [6400, 12032]
    assert SIZES.routing_at == 6144
    assert SIZES.total == TOTAL
    assert BoardSizes(2, 3, 5, 32, 16).x_at == X_AT - 1024 - 128  # that does not profile, with one branch
    # 130 owners take two lines, and 130 words five; 16 times 33 words take 17.
    assert BoardSizes(1, 13, 10, 32, 16).x_at == 512 + 256 + 2 * 16 * 520 + 256
    assert BoardSizes(1, 13, 10, 32, 16).words_bytes == 640
    assert BoardSizes(1, 1, 33, 32, 16).x_at == 512 + 128 + 2 * 17 * 128 + 128
    # Three panels of two groups: 2 * 32 * 3 * 2 bytes; 48 tokens of them: 48 * 64 * 2.
    assert BoardSizes(1, 1, 2, 32, 48, Noted.FIRING).x_at == 512 + 128 + 2 * 128 + 128 + 384
    assert BoardSizes(1, 1, 2, 32, 48, Noted.MAGNITUDES).x_at == 512 + 128 + 2 * 128 + 128 + 6144


def test_every_byte() -> None:
    """Each field written with values of its own lies where the diagram says, and nowhere else."""
    board = board_of()
    x, y = np.arange(512, dtype=np.float32) + 0.25, np.arange(512) * 3 - (1 << 61)
    inverse = 2.0 ** np.arange(-39, 61, 6.25)
    board.abort[:] = 11
    board.job[:] = 21, 22
    board.descriptor[:] = -1, 32, 33, 34, 35
    board.owner[:] = np.arange(100, 115).reshape(3, 5)
    board.mask[:] = np.arange(240).reshape(16, 3, 5) + 0xFFFFFF00
    board.computed[:] = np.arange(240).reshape(16, 3, 5) + 0xEEEEEE00
    board.uses[:] = np.arange(144).reshape(16, 3, 3)
    board.noted[:] = np.arange(480).reshape(3, 5, 32, 1) + 0xF000
    board.x[:] = x
    board.inverse[:] = inverse
    board.routing[:] = np.arange(48).reshape(16, 3) / 64
    for index in range(2):
        board.done[index][:] = 50 + index, 60 + index
        board.record[index][:] = [70 + index, 80 + index, 90 + index, 100 + index]
        board.quit[index][:] = 110 + index
        board.slot[index][:] = np.arange(15).reshape(3, 5) - 7 - 100 * index
        board.requested[index][:] = np.arange(240).reshape(16, 3, 5) + 0xDDDDDD00 + 256 * index
        board.y[index][:] = y + index
    parts = [
        (0, b"WARMFRNT" + struct.pack("=8q", 9, 2, 3, 5, 32, 16, 1, 3)),
        (128, struct.pack("=q", 11)),
        (256, struct.pack("=2q", 21, 22)),
        (384, struct.pack("=5q", -1, 32, 33, 34, 35)),
        (512, bytes(range(100, 115))),
        (640, struct.pack("=240I", *range(0xFFFFFF00, 0xFFFFFFF0))),
        (1664, struct.pack("=240I", *range(0xEEEEEE00, 0xEEEEEEF0))),
        (2688, bytes(range(144))),
        (2944, struct.pack("=480H", *range(0xF000, 0xF000 + 480))),
        (3968, struct.pack("=512f", *x)),
        (6016, struct.pack("=16f", *inverse)),
        (6144, struct.pack("=48f", *(each / 64 for each in range(48)))),
    ]
    for index, at in enumerate((6400, 12032)):
        parts += [
            (at, struct.pack("=2q", 50 + index, 60 + index)),
            (at + 128, struct.pack("=4q", *(base + index for base in (70, 80, 90, 100)))),
            (at + 256, struct.pack("=q", 110 + index)),
            (at + 384, struct.pack("=15i", *(each - 7 - 100 * index for each in range(15)))),
            (at + 512, struct.pack("=240I", *(0xDDDDDD00 + 256 * index + each for each in range(240)))),
            (at + 1536, struct.pack("=512q", *(y + index))),
        ]
    expected = bytearray(TOTAL)
    for at, data in parts:
        expected[at : at + len(data)] = data
    assert board.mapping.tobytes() == bytes(expected)


def test_a_board_that_does_not_profile_has_no_room_for_it() -> None:
    board = board_of(BoardSizes(2, 3, 5, 32, 16))
    assert board.noted.size == 0
    board.x[:] = 1.0
    assert not board.computed.any()
    assert board.mapping[2816:2820].view(np.float32)[0] == 1.0


def test_owner_is_by_layer_and_group() -> None:
    board = board_of()
    board.owner[2, 3] = 7
    assert board.mapping[512 + 2 * 5 + 3] == 7
    assert board.owner.sum() == 7


def test_words_that_different_threads_write_lie_on_lines_of_their_own() -> None:
    fd = create_shared("warmfront-test", SIZES.total)
    board = Board.create(map_shared(fd), SIZES)
    os.close(fd)
    words = (board.abort, board.job, board.descriptor, *board.done, *board.record, *board.quit)
    lines = [address(field) for field in words]
    assert all(at % 128 == 0 for at in lines)
    assert len(set(lines)) == len(lines)
    tables = (board.owner, board.mask, board.computed, board.noted, *board.slot, *board.requested)
    assert all(address(field) % 128 == 0 for field in (*tables, board.x, board.inverse, board.routing, *board.y))


OTHER = """
import dataclasses, sys
from warmfront.shared.model.noted import Noted
from warmfront.shared.wire.board import Board
from warmfront.shared.machine.memory import map_shared
board = Board.attach(map_shared(int(sys.argv[1])))
print(*dataclasses.astuple(board.sizes), *board.descriptor, board.x[5], board.inverse[15], flush=True)
board.y[1][:3] = 1 << 60, -2, int(board.x[5] * board.inverse[15])
board.done[1][0] = board.job[0]
board.owner[1] = 9
board.requested[1][3, 2] = 0xFFFFFFFF
board.slot[0][1, 4] = board.slot[1][1, 4] + 1
"""


def test_another_process_sees_and_writes_the_same_board() -> None:
    fd = create_shared("warmfront-test", SIZES.total)
    try:
        board = Board.create(map_shared(fd), SIZES)
        board.descriptor[:] = 2, 16, 16, 0, 77
        board.job[0] = 41
        board.x[5], board.inverse[15] = -3.5, 2.0**40
        board.slot[1][1, 4] = 1 << 20
        run = subprocess.run(
            [sys.executable, "-c", OTHER, str(fd)], pass_fds=[fd], check=True, capture_output=True, text=True
        )
    finally:
        os.close(fd)
    assert run.stdout.split() == [
        "2",
        "3",
        "5",
        "32",
        "16",
        "1",
        "3",
        "2",
        "16",
        "16",
        "0",
        "77",
        "-3.5",
        "1.0995116e+12",
    ]
    assert board.y[1][:4].tolist() == [1 << 60, -2, -7 << 39, 0]
    assert not board.y[0].any()
    assert board.done[1][0] == 41
    assert board.done[0][0] == 0
    assert board.owner.tolist() == [[0] * 5, [9] * 5, [0] * 5]
    assert board.requested[1][3].tolist() == [[0] * 5, [0] * 5, [0xFFFFFFFF] * 5]
    assert board.requested[1].sum() == 5 * 0xFFFFFFFF
    assert not board.requested[0].any()
    assert board.slot[0].tolist() == [[0] * 5, [0, 0, 0, 0, (1 << 20) + 1], [0] * 5]


def test_attach_gives_what_create_laid_out() -> None:
    made = board_of()
    made.x[:] = np.arange(512)
    read = Board.attach(made.mapping)
    assert read.sizes == SIZES
    np.testing.assert_array_equal(read.x, made.x)
    read.done[1][0] = 5
    assert made.done[1][0] == 5


@pytest.mark.parametrize("mapping", [np.zeros(0, np.uint8), np.zeros(511, np.uint8), np.zeros(TOTAL, np.uint8)])
def test_what_is_no_board(mapping: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="the shared memory handed over is not a board"):
        Board.attach(mapping)


def test_another_version() -> None:
    board = board_of()
    board.mapping[8:16].view(np.int64)[:] = 2
    with pytest.raises(ProtocolError, match=f"board of version 2 and {TOTAL} bytes: this is version 9"):
        Board.attach(board.mapping)


@pytest.mark.parametrize("size", [TOTAL - 128, TOTAL + 128, 512])
def test_a_header_that_does_not_fit_the_memory(size: int) -> None:
    mapping = np.zeros(size, np.uint8)
    mapping[:512] = board_of().mapping[:512]
    with pytest.raises(ProtocolError, match=f"and {size} bytes"):
        Board.attach(mapping)
