"""Compiled row arithmetic against float64 numpy, for this machine and for the plainest.

Run: pytest tests/shared/kernels/test_rows.py
"""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from warmfront.shared.kernels import byte_dot, rows
from warmfront.shared.kernels.fp16 import to_half
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, pack, unpack

COLS = 96
PAGE = 4096


# Q4C rows are bare numbers: tests/shared/kernels/feed_forward/test_down_rows.py.
ROW_KINDS = [kind for kind in Kind if kind != Kind.Q4C]


def dot(kind: Kind, row: int, x: np.ndarray) -> float:
    """The kernel on `x`, quantised as it wants it."""
    prepared = np.zeros(byte_dot.quantised_bytes(COLS), np.uint8)
    q = byte_dot.quantise_input(address(x), address(prepared), COLS)
    return float(rows.dot(kind, row, address(x), q, COLS, 0))


@kernel
def round_all(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = to_half(values[i])


def rows_of(kind: Kind, rows: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Packed random rows at an odd address, and what they hold in float64."""
    values = np.random.default_rng(int(kind)).standard_normal((rows, COLS)).astype(np.float32)
    packed = pack(values, kind)
    buffer = np.zeros(packed.size + 1, np.uint8)
    buffer[1:] = packed.ravel()
    return buffer[1:].reshape(packed.shape), unpack(packed, kind, COLS).astype(np.float64)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_dot_and_widen(kind: Kind) -> None:
    packed, values = rows_of(kind)
    x = np.random.default_rng(9).standard_normal(COLS).astype(np.float32)
    assert rows.row_stride(kind, COLS) == packed.shape[1]
    for row, reference in zip(packed, values, strict=True):
        assert dot(kind, address(row), x) == pytest.approx(reference @ x, abs=2e-3)
        wide = np.empty(COLS, np.float32)
        rows.widen(kind, address(row), address(wide), COLS)
        np.testing.assert_allclose(wide, reference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_two_rows_at_once_are_one_after_the_other(kind: Kind) -> None:
    packed, _ = rows_of(kind)
    x, out = np.random.default_rng(9).standard_normal(COLS).astype(np.float32), np.full(4, np.nan, np.float32)
    prepared = np.zeros(byte_dot.quantised_bytes(COLS), np.uint8)
    q = byte_dot.quantise_input(address(x), address(prepared), COLS)
    both, outs = (address(packed[5]), address(packed[2])), (address(out[2:]), address(out[1:]))
    rows.dot_two(kind, both, address(x), q, COLS, outs, 4096)
    assert out[1:3].tolist() == [dot(kind, address(packed[2]), x), dot(kind, address(packed[5]), x)]
    assert np.isnan(out[[0, 3]]).all()


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_what_a_longer_input_left_behind_counts_for_nothing(kind: Kind) -> None:
    """One buffer is prepared for inputs of several lengths: here all that is not written reads as NaN."""
    packed, values = rows_of(kind)
    x = np.random.default_rng(9).standard_normal(COLS).astype(np.float32)
    prepared = np.full(byte_dot.quantised_bytes(2048), 0xFF, np.uint8)
    q = byte_dot.quantise_input(address(x), address(prepared), COLS)
    for row, reference in zip(packed, values, strict=True):
        got = rows.dot(kind, address(row), address(x), q, COLS, 0)
        assert got == pytest.approx(reference @ x, abs=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_an_input_that_is_not_finite_shows(kind: Kind, value: float) -> None:
    x = np.ones(COLS, np.float32)
    x[40] = value
    for row in rows_of(kind)[0]:
        assert not np.isfinite(dot(kind, address(row), x))


@pytest.fixture
def pages() -> Iterator[np.ndarray]:
    """Four pages; behind them lies one that may not be read."""
    region = mmap.mmap(-1, 5 * PAGE)
    memory = np.frombuffer(region, np.uint8)
    libc = ctypes.CDLL(None)
    end, size = ctypes.c_void_p(address(memory) + 4 * PAGE), ctypes.c_size_t(PAGE)
    assert libc.mprotect(end, size, 0) == 0
    yield memory[: 4 * PAGE]
    assert libc.mprotect(end, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("cols", [512, 1536, 2048])
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_fetching_ahead_changes_no_bit(kind: Kind, cols: int, pages: np.ndarray) -> None:
    """Also of rows behind which nothing may be read, nor is there anything to fetch."""
    rng = np.random.default_rng(9)
    packed = pack(rng.standard_normal((2, cols)).astype(np.float32), kind)
    pages[-packed.size :] = packed.ravel()
    x = rng.standard_normal(cols).astype(np.float32)
    prepared = np.zeros(byte_dot.quantised_bytes(cols), np.uint8)
    q = byte_dot.quantise_input(address(x), address(prepared), cols)
    for number in (1, 2):
        row_at = address(pages) + pages.size - number * packed.shape[1]
        distances = (0, 1, 64, 2048, 5120, 16384, PAGE - row_at, -PAGE - row_at)
        assert len({rows.dot(kind, row_at, address(x), q, cols, ahead) for ahead in distances}) == 1


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_stays_within_its_row(kind: Kind) -> None:
    """Neighbours of the row are NaN in every type, neighbours of the output keep their values."""
    packed, values = rows_of(kind, 1)
    fenced = np.full(packed.size + 256, 0xFF, np.uint8)
    fenced[128:-128] = packed[0]
    row = address(fenced) + 128
    x, wide = (np.full(COLS + 64, np.nan, np.float32) for _ in range(2))
    inner = slice(32, 32 + COLS)
    x[inner] = 1
    assert dot(kind, row, x[inner]) == pytest.approx(values.sum(), abs=2e-3)
    rows.widen(kind, row, address(wide[inner]), COLS)
    assert np.isnan(wide).sum() == 64
    assert not np.isnan(wide[inner]).any()


def test_every_half_is_widened_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(halves.size, np.float32)
    rows.widen(Kind.F16, address(halves), address(wide), halves.size)
    np.testing.assert_array_equal(wide, halves.view(np.float16).astype(np.float32))
    assert np.array_equal(np.signbit(wide), np.signbit(halves.view(np.float16)))


def test_to_half_rounds_like_numpy() -> None:
    """Random values, all midpoints between two halves, overflow, subnormal numbers, infinities, NaN."""
    rng = np.random.default_rng(0)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    special = np.array([65504, 65519.996, 65520, 1e6, np.inf, -np.inf, np.nan, -0.0, 1e-8, 2.0**-25], np.float32)
    values = np.concatenate((rng.standard_normal(1000, np.float32), halves, middles, -middles, special))
    out = np.zeros(values.size, np.uint16)
    round_all(values, out)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(out.view(np.float16), expected)
    assert np.array_equal(np.signbit(out.view(np.float16)), np.signbit(expected))


@pytest.mark.parametrize(("total", "unit", "threads"), [(10, 1, 3), (96, 8, 5), (7, 8, 2), (0, 1, 2), (33, 8, 4)])
def test_shares_cover_everything_once(total: int, unit: int, threads: int) -> None:
    ranges = [rows.share(total, unit, rank, rank + 1, threads) for rank in range(threads)]
    assert [i for low, high in ranges for i in range(low, high)] == list(range(total))
    assert all(low % unit == 0 or low == high for low, high in ranges)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the targets are x86's")
@pytest.mark.parametrize(("cpu", "features"), [("x86-64", ""), ("x86-64-v3", "+avx2,+fma,+f16c")])
def test_other_machines(tmp_path: Path, cpu: str, features: str) -> None:
    """The tests of all arithmetic again, compiled for SSE2 alone and, where the machine has more, for AVX2."""
    if os.environ.get("NUMBA_CPU_NAME"):
        pytest.skip("this is such a run")
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if not {feature.removeprefix("+") for feature in features.split(",") if feature} <= flags:
        pytest.skip(f"this machine cannot run {cpu}")
    environment = os.environ | {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    if features and "avx512_vnni" not in flags:
        pytest.skip("this machine's own code is of that kind")
    files = [
        Path(__file__).parent / folder / f"test_{module}.py"
        for folder, modules in (
            ("", ("rows", "exact_sums", "multi_rows", "lowbit", "gemm", "activation", "tiles")),
            ("feed_forward", ("down_rows", "down_tiles", "ffn")),
            ("prefill", ("matrix",)),
            ("attention", ("kv_tiles",)),
        )
        for module in modules
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
