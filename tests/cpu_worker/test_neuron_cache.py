"""The cache of a CPU worker alone, without jobs: what is read where, and what happens when it cannot be read.

pytest tests/cpu_worker/test_neuron_cache.py
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.cpu_worker.cache_table import admit_units, begin_job, publish_requests, touch_units
from warmfront.cpu_worker.neuron_cache import NeuronCache
from warmfront.shared.errors import DamagedError, ResourceError, WarmfrontError
from warmfront.shared.kernels.feed_forward.bundles import arrange_group, bundles_at
from warmfront.shared.kernels.fetching import usual_distances
from warmfront.shared.machine.memory import address, zeros
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Work, selector_of
from warmfront.shared.wire.messages import Assignment

# Neurons of 3 KB, of which each fills a page.
SIZES = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2}


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackedModel]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny_llama(hidden_act="relu", **SIZES)
    with PackedModel(ensure_packed(folder, "f32", print, lambda _done, _total: None)) as packed:
        yield packed


class Opened:
    """A cache, and the word that ends it."""

    def __init__(self, model: PackedModel, budget: int, selector: str = "core", policy: str = "lru") -> None:
        shape = model.spec.layers, model.layout.groups
        plan = Assignment(
            index=0,
            model=os.fspath(model.path),
            neuron_order=model.order,
            cpus=[0],
            selector=selector,
            home=bytes(shape[0] * shape[1]),
            spare_slots=0,
            slowdown=1.0,
            vram_budget=0,
            ram_budget=budget,
            offload_policy=policy,
            distances=usual_distances().tobytes(),
        )
        self.quit = zeros(1, np.int64)
        self.cache = NeuronCache(plan, model, np.argwhere(np.ones(shape, bool)), address(self.quit))

    def __enter__(self) -> NeuronCache:
        return self.cache

    def __exit__(self, *_: object) -> None:
        self.quit[0] = 1
        self.cache.stop()


def groups_of(model: PackedModel) -> npt.NDArray[np.uint8]:
    """All bundles as they are in the file: uint8 [layers, neurons, bundle_bytes]."""
    layout = model.layout
    out = np.empty((model.spec.layers, layout.groups, layout.group_bytes), np.uint8)
    for layer in range(model.spec.layers):
        model.read_groups(layer, 0, out[layer])
    return out.reshape(model.spec.layers, layout.groups * GROUP, layout.bundle_bytes)


def test_what_is_held_is_what_the_file_has(model: PackedModel) -> None:
    """At first the neurons of the first groups of each layer, as many as the budget holds."""
    expected, layout = groups_of(model), model.layout
    neurons = layout.groups * GROUP
    with Opened(model, budget=3_500_000) as cache:
        cache.fill(0)
        cache.check()
        held = cache.record.held
        count = int(np.bitwise_count(held).sum())
        assert neurons < count < 2 * neurons
        assert count * 4096 < 3_500_000
        memory = cache._memory.reshape(2, neurons, 4096)
        bits = np.unpackbits(held.view(np.uint8), bitorder="little").reshape(2, neurons).astype(bool)
        np.testing.assert_array_equal(memory[bits][:, : layout.bundle_bytes], expected[bits])
        assert not memory[~bits].any()
        np.testing.assert_array_equal(cache.record.arrived, held)


@pytest.mark.parametrize("selector", ["all", "exact"])
def test_groups_lie_as_in_a_worker_that_holds_all(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selector: str
) -> None:
    """In 8 bits, whose rows come in tiles where the machine multiplies bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed = ensure_packed(tiny_llama(hidden_act="relu", **SIZES), "q8", print, lambda _done, _total: None)
    with PackedModel(packed) as model, Opened(model, 8_000_000, selector) as cache:
        cache.fill(0)
        cache.check()
        layout, work = model.layout, selector_of(selector).work
        group = np.empty((1, layout.group_bytes), np.uint8)
        usual = bundles_at(
            address(group),
            layout,
            model.spec.architecture.feed_forward,
            work is Work.DENSE,
            apart=work is Work.GATES,
        )
        memory = cache._memory.reshape(model.spec.layers, layout.groups, -1)
        gates = GROUP * layout.gate_row_bytes
        for layer, number in np.ndindex(memory.shape[:2]):
            model.read_groups(layer, number, group)
            arrange_group(usual, address(group))
            if selector == "all":
                np.testing.assert_array_equal(memory[layer, number, : layout.group_bytes], group[0])
                continue
            np.testing.assert_array_equal(memory[layer, number, :gates], group[0, :gates])
            # Where the kernels look for the bundle of the first neuron, without its gate row, and of the last.
            rest = layout.bundle_bytes - layout.gate_row_bytes
            for neuron in (0, GROUP - 1):
                at = cache.bundles.first + neuron * cache.bundles.bundle_bytes + layout.gate_row_bytes
                found = memory[layer, number, at : at + rest]
                np.testing.assert_array_equal(found, group[0, gates + neuron * rest :][:rest])


@pytest.mark.parametrize("selector", ["all", "exact"])
def test_a_budget_too_small_says_what_would_do(model: PackedModel, selector: str) -> None:
    with pytest.raises(ResourceError, match=r"pass --ram-budget (\d+)MB or more") as refused:
        Opened(model, 1_000_000, selector)
    told = int(str(refused.value).split("--ram-budget ")[1].split("MB")[0])
    with Opened(model, told * 1_000_000, selector) as cache:
        cache.fill(0)
        cache.check()


def test_what_is_wanted_finds_room(model: PackedModel) -> None:
    """Also where what may go has come down to the list of what the job uses, and stands behind that."""
    every = 0xFFFFFFFF
    with Opened(model, budget=3_500_000, policy="balance") as cache:
        cache.fill(0)
        cache.check()
        record = cache.record
        groups = record.held.shape[1]
        scores = record.score.reshape(2, -1)
        for layer, score in ((1, 0.06), (0, 0.04)):
            scores[layer] = score
            begin_job(record, layer)
            for group in range(groups):
                touch_units(record, layer, group, every)
            # As if some tokens had passed.
            scores[1] = 0.05
        for group in range(groups):
            admit_units(record, 0, group, every)
        publish_requests(record)
        assert (record.held[0] == every).all()
        assert 0 < np.bitwise_count(record.held[1]).sum() < groups * GROUP


def _replace(cache: NeuronCache, path: Path, flags: int) -> None:
    """Have the cache read from another file."""
    other = os.open(path, flags)
    os.dup2(other, cache._file)
    os.close(other)


def test_reads_that_fail(model: PackedModel) -> None:
    """A descriptor that cannot be read, as a disk that answers every attempt with an error."""
    with Opened(model, budget=3_500_000) as cache:
        _replace(cache, Path("/dev/null"), os.O_WRONLY)
        cache.fill(0)
        with pytest.raises(ResourceError, match=f"reading {model.path} failed: Bad file descriptor"):
            cache.check()


@pytest.mark.parametrize(("size", "error"), [(1.0, DamagedError), (0.3, WarmfrontError)])
def test_another_content(model: PackedModel, tmp_path: Path, size: float, error: type[Exception]) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(int(model.path.stat().st_size * size) // 4096 * 4096 + 4096))
    with Opened(model, budget=3_500_000) as cache:
        _replace(cache, other, os.O_RDONLY)
        cache.fill(0)
        with pytest.raises(error, match=str(model.path)):
            cache.check()
