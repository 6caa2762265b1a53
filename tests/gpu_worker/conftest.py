"""Cases, an independent reference, and a stand-in for CuPy (stand_in/cupy.py) where there is no GPU.

The reference decodes packed rows weight by weight in float64, from the layout that shared/model/formats.py states.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.activations import factors, firing
from warmfront.gpu_worker.device import Device
from warmfront.shared.machine.memory import zeros
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import Kind, pack

HERE = Path(__file__).parent

Doubles = npt.NDArray[np.float64]


def decode(row: bytes, kind: Kind, cols: int) -> list[float]:
    """A packed row, weight by weight."""

    def numbers(at: int, count: int, code: str) -> list[float]:
        return [float(value) for value in np.frombuffer(row, code, count, at)]

    blocks = cols // 32
    if kind in (Kind.F32, Kind.F16):
        return numbers(0, cols, "f4" if kind == Kind.F32 else "f2")
    if kind == Kind.BF16:
        widened = b"".join(b"\0\0" + row[2 * j : 2 * j + 2] for j in range(cols))
        return [float(value) for value in np.frombuffer(widened, "f4")]
    if kind == Kind.Q8:
        scales = numbers(cols, blocks, "f2")
        return [(row[j] - 256 * (row[j] > 127)) * scales[j // 32] for j in range(cols)]
    assert kind in (Kind.Q4, Kind.Q4S, Kind.Q4C), f"{kind.name} is not decoded here: add a branch"
    nibbles = [row[j // 32 * 16 + j % 16] >> 4 * (j % 32 // 16) & 15 for j in range(cols)]
    if kind == Kind.Q4C:
        return [float(q) for q in nibbles]
    scales = numbers(cols // 2, blocks, "f2")
    if kind == Kind.Q4S:
        return [(q - 8) * scales[j // 32] for j, q in enumerate(nibbles)]
    minima = numbers(cols // 2 + cols // 16, blocks, "f2")
    return [q * scales[j // 32] + minima[j // 32] for j, q in enumerate(nibbles)]


@dataclass(frozen=True)
class Case:
    """Groups of random neurons, uint8 [groups, group_bytes], and inputs x [tokens, hidden]."""

    layout: BundleLayout
    activation: str
    groups: npt.NDArray[np.uint8]
    x: npt.NDArray[np.float32]
    _decoded: dict[int, Doubles] = field(default_factory=dict)

    @classmethod
    def random(cls, layout: BundleLayout, activation: str, tokens: int) -> "Case":
        rng = np.random.default_rng(0)
        shape = (layout.groups * GROUP, layout.hidden)
        groups = np.zeros((layout.groups, layout.group_bytes), np.uint8)
        bundles = groups[:, : layout.tail_offset].reshape(layout.groups, GROUP, layout.bundle_bytes)
        kinds = (layout.gate_kind, layout.gate_kind, layout.down_kind)
        for offset, kind in zip((0, layout.up_offset, layout.down_offset), kinds, strict=True):
            if kind == Kind.Q4C:
                rows = rng.integers(0, 256, (shape[0], layout.hidden // 2), dtype=np.uint8)
                tail = rng.normal(size=(layout.groups, 2 * layout.hidden), scale=0.02).astype(np.float16)
                groups[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden] = tail.view(np.uint8)
            else:
                rows = pack(rng.normal(size=shape, scale=0.1).astype(np.float32), kind)
            bundles[:, :, offset : offset + rows.shape[1]] = rows.reshape(layout.groups, GROUP, -1)
        x = rng.normal(size=(tokens, layout.hidden)).astype(np.float32)
        return cls(layout, activation, groups, x)

    def _rows(self, picked: list[int], offset: int, kind: Kind) -> Doubles:
        """The rows at `offset` of the bundles of the picked groups: [neurons, hidden]."""
        if offset not in self._decoded:  # of all groups, once
            layout = self.layout
            bundles = self.groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
            rows = np.array([decode(bundle[offset:].tobytes(), kind, layout.hidden) for bundle in bundles])
            if kind == Kind.Q4C:
                tails = self.groups[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden].copy()
                parts = tails.view(np.float16).astype(np.float64).reshape(-1, 2, layout.hidden)
                scale, minimum = np.repeat(parts, GROUP, 0).swapaxes(0, 1)
                rows = rows * scale + minimum
            self._decoded[offset] = rows.reshape(layout.groups, GROUP, layout.hidden)
        return self._decoded[offset][picked].reshape(-1, self.layout.hidden)

    def expect(
        self, picked: list[int], sparse: bool, chosen: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Doubles, npt.NDArray[np.bool_]]:
        """The output of the picked groups (of their `chosen` neurons), and who was computed: [tokens, neurons]."""
        layout, x = self.layout, self.x.astype(np.float64)
        gates = x @ self._rows(picked, 0, layout.gate_kind).T
        ups = x @ self._rows(picked, layout.up_offset, layout.gate_kind).T
        visited = np.ones(gates.shape, bool) if chosen is None else np.broadcast_to(chosen, gates.shape)
        if sparse:
            visited = visited & firing(self.activation, gates, ups)
        h = np.where(visited, factors(self.activation, gates, ups), 0)
        return h @ self._rows(picked, layout.down_offset, layout.down_kind), visited


def to_panels(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[tokens, hidden] as [panels, hidden, 16], with NaN for tokens that the last panel lacks."""
    panels = zeros((-(-len(x) // 16), x.shape[1], 16), np.float32)
    for first in range(0, len(x), 16):
        panels[first // 16] = np.nan
        panels[first // 16, :, : len(x[first : first + 16])] = x[first : first + 16].T
    return panels


def from_panels(panels: npt.NDArray[Any], tokens: int) -> npt.NDArray[Any]:
    """The inverse."""
    return panels.swapaxes(1, 2).reshape(-1, panels.shape[1])[:tokens]


def bits_of(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """The neurons of a mask, one after the other."""
    return np.array([word >> bit & 1 for word in words.tolist() for bit in range(GROUP)], bool)


def units(tokens: int) -> npt.NDArray[np.float32]:
    """1 / unit of each token's sums, different for neighbours."""
    return (2.0 ** (30 + np.arange(tokens) % 5)).astype(np.float32)


def execute(device: Device, slots: Any, x: Any, sparse: bool, out: Any, *words: Any) -> tuple[int, int]:
    """`Device.execute` with a unit for each token, and the sums as floats in `out`."""
    sums = np.full(x.shape, -1 << 62, np.int64)
    done = device.execute(slots, x, units(len(x)), sparse, sums, *words)
    out[:] = sums / units(len(x))[:, None].astype(np.float64)
    return done


def execute_many(device: Device, slots: Any, x: Any, tokens: int, out: Any) -> tuple[int, int]:
    """The same of `Device.execute_many`."""
    sums, inverse = np.full(x.shape, -1 << 62, np.int64), units(16 * len(x))
    done = device.execute_many(slots, x, inverse, tokens, sums)
    out[:] = sums / inverse.reshape(-1, 1, 16).astype(np.float64)
    return done


@pytest.fixture
def random_case() -> Callable[[BundleLayout, str, int], Case]:
    return Case.random


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the kernels that the stand-in compiles: tests that want the same share them."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def cpu_cupy(monkeypatch: pytest.MonkeyPatch, compiled: Path) -> Any:
    """`import cupy` gives the stand-in, new for each test."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    spec = spec_from_file_location("cupy", HERE / "stand_in" / "cupy.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.compiled = compiled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module
