"""Models larger than the memory: the packed file is the neurons' home, a worker's memory a cache of it.

Run: pytest tests/integration/test_ram_budget.py
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.integration.command import run
from tests.integration.reference import all_logits, llama_from_folder
from warmfront.coordinator import Engine
from warmfront.shared.errors import DamagedError, ModelError, ResourceError, WarmfrontError

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
# A neuron is 3 KB in float32, a page each in memory: 16.8 MB in all.
SHAPE = {"hidden": 256, "layers": 4, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}
NEURON, NEURONS = 4096, 4 * 1024
IDS = [int(token) for token in np.random.default_rng(0).integers(259, 512, 60)]
PROMPT = 5
# Of two fifths of the neurons, and what a prompt and the readers need.
BUDGET = 8_000_000

pytestmark = pytest.mark.usefixtures("compiled")
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    subprocess.run([sys.executable, MAKER, made, *sizes, "--formats=hf"], check=True, capture_output=True)
    return made / "hf"


@pytest.fixture(scope="module")
def in_memory(folder: Path) -> dict[str, Floats]:
    """The logits of engines that hold all, by selector; those of `exact` are transformers'."""
    logits = {selector: decoded(folder, selector=selector)[0] for selector in ("lowrank", "exact", "all")}
    expected = all_logits(llama_from_folder(folder), IDS)[PROMPT - 1 :]
    assert np.abs(logits["exact"] - expected).max() < 1e-3 * np.abs(expected).max()
    return logits


def decoded(folder: Path, **overrides: Any) -> tuple[Floats, list[int], int]:
    """The logits behind each token, what the cache counted, and its bytes in memory as the kernel counts them."""
    with Engine.load(str(folder), dtype="f32", gpu="none", **overrides) as engine:
        rows = np.array(list(engine.forced_logits(IDS, PROMPT)))
        report = engine.statistics.reports()["cpu0"]
        (worker,) = engine.statistics.workers()
        groups = engine.model.spec.layers * engine.model.layout.groups
        return rows, report.cache, resident(worker.pid, groups)


def resident(pid: int, groups: int) -> int:
    """Resident bytes of the reservation for so many groups: the mapping with the most addresses that is a multiple of
    them in pages and may not have huge pages."""
    found = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
        fields = dict(re.findall(r"^(\w+): +(.+)$", mapping, re.MULTILINE))
        if " nh" in f" {fields['VmFlags']}" and int(fields["Size"].split()[0]) * 1024 % (groups * 4096) == 0:
            found = max(found, int(fields["Rss"].split()[0]) * 1024)
    return found


@pytest.mark.parametrize(
    ("selector", "policy"),
    [
        ("lowrank", "lru"),
        ("lowrank", "window"),
        ("lowrank", "frequency"),
        ("lowrank", "balance"),
        ("exact", "balance"),
        ("all", "lru"),
    ],
)
def test_logits_are_those_of_a_model_in_memory(
    folder: Path, in_memory: dict[str, Floats], selector: str, policy: str
) -> None:
    # By `exact`, whose gates stay, groups are cached: two thirds of a neuron do not fill a page.
    budget = BUDGET + 3_000_000 * (selector == "exact")
    got, counters, held = decoded(folder, selector=selector, ram_budget=budget, offload_policy=policy)
    np.testing.assert_array_equal(got, in_memory[selector])
    hits, misses, evicted, requests, read = counters[:5]
    assert min(hits, misses, evicted, requests, read) > 0
    assert counters[7] == sum(counters[8:]) == len(IDS) - PROMPT - 1  # the last token is not over yet
    assert 0 < held <= budget
    if policy in ("balance", "frequency") and selector == "lowrank":
        assert hits / (hits + misses) > 0.85


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_window_of_no_tokens_holds_nothing(folder: Path, in_memory: dict[str, Floats], asynchronous: bool) -> None:
    """What a prompt finds there goes before any of its threads takes it for there."""
    options = {"ram_budget": BUDGET, "offload_policy": "window", "offload_window": 0}
    got, counters, held = decoded(folder, selector="lowrank", offload_asynchronous=asynchronous, **options)
    np.testing.assert_array_equal(got, in_memory["lowrank"])
    assert counters[0] == 0 < counters[1]
    assert 0 < held < 0.1 * NEURONS * NEURON


def test_a_window_holds_what_the_last_tokens_used(folder: Path) -> None:
    _, counters, held = decoded(
        folder, selector="lowrank", ram_budget=BUDGET, offload_policy="window", offload_window=2
    )
    # A token fires a tenth, three of them less than three tenths.
    assert 0 < held < 0.3 * NEURONS * NEURON
    assert counters[1] > counters[0] / 4


def test_bench_tells_what_the_disk_allows(folder: Path, in_memory: dict[str, Floats]) -> None:
    options = ["--dtype=f32", "--gpu=none", f"--ram-budget={BUDGET}", "--selectors=lowrank"]
    outcome = run("bench", folder, *options, "--contexts=8", "-n8", "--rounds=1", timeout=120)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    disk = json.loads(lines[-1])["rows"][0]["disk"]
    assert 0 < disk["hit_share"] < 1
    assert 0 < disk["miss_share_p99"] < 1
    # At most all that a token uses, a tenth of the neurons, and as much ahead in vain.
    assert 0 < disk["bytes_per_token"] < 0.2 * NEURONS * NEURON
    assert disk["roofline_tps"] == pytest.approx(disk["bandwidth"] / disk["bytes_per_token"], rel=0.01)
    assert any(line.startswith("lowrank, context 8, from the disk: ") for line in lines)


@pytest.mark.parametrize(
    ("name", "options"),
    [("qwen2 moe", {"hidden_act": "silu"}), ("qwen2 moe", {"hidden_act": "relu"}), ("opt", {})],
    ids=["experts", "relu experts", "without gates, with biases"],
)
def test_other_families(tiny_family: Callable[..., Path], name: str, options: dict[str, Any]) -> None:
    folder, ids = tiny_family(name, **options), [3 + 7 * i % 290 for i in range(30)]
    with pytest.raises(ResourceError) as refused:
        Engine.load(str(folder), dtype="f32", gpu="none", ram_budget=1).close()
    # As small as it may be: what is needed is told.
    told = re.search(r"pass --ram-budget (\d+)MB or more$", str(refused.value))
    assert told is not None
    rows = []
    for budget in (None, int(told[1]) * 1_000_000):
        with Engine.load(str(folder), dtype="f32", gpu="none", ram_budget=budget, verify=True) as engine:
            rows.append(np.array(list(engine.forced_logits(ids, PROMPT))))
    np.testing.assert_array_equal(rows[1], rows[0])


@pytest.fixture
def packed(folder: Path, in_memory: dict[str, Floats], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The folder, and its packed model, which is put back afterwards."""
    with Engine.load(str(folder), dtype="f32", gpu="none") as engine:
        path = engine.model.path
    shutil.copy(path, tmp_path / "kept")
    yield folder, path
    shutil.copy(tmp_path / "kept", path)


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)


def _damage(path: Path) -> None:
    """A wrong bit in every page."""
    with path.open("r+b") as file:
        for at in range(1 << 20, path.stat().st_size, 4096):
            file.seek(at)
            file.write(b"?")


def assert_all(rows: Iterable[Floats], expected: Floats) -> None:
    """What comes is right, as far as it comes."""
    for row, right in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row, right)


@pytest.mark.parametrize(("harm", "error"), [(_cut, ModelError), (_damage, DamagedError)])
def test_a_file_that_changes_in_use_is_never_computed_with(
    packed: tuple[Path, Path], in_memory: dict[str, Floats], harm: Callable[[Path], None], error: type[Exception]
) -> None:
    folder, path = packed
    with Engine.load(str(folder), dtype="f32", gpu="none", selector="lowrank", ram_budget=BUDGET) as engine:
        rows = engine.forced_logits(IDS, PROMPT)
        np.testing.assert_array_equal([next(rows), next(rows)], in_memory["lowrank"][:2])
        harm(path)
        with pytest.raises(error, match=str(path)):
            assert_all(rows, in_memory["lowrank"][2:])


def test_a_file_that_is_replaced_is_still_read(packed: tuple[Path, Path], in_memory: dict[str, Floats]) -> None:
    folder, path = packed
    with Engine.load(str(folder), dtype="f32", gpu="none", selector="lowrank", ram_budget=BUDGET) as engine:
        path.unlink()
        path.write_bytes(b"another")
        np.testing.assert_array_equal(list(engine.forced_logits(IDS, PROMPT)), in_memory["lowrank"])


def test_a_worker_killed_in_use_gives_no_wrong_logits(folder: Path, in_memory: dict[str, Floats]) -> None:
    with Engine.load(str(folder), dtype="f32", gpu="none", selector="lowrank", ram_budget=BUDGET) as engine:
        rows = engine.forced_logits(IDS, PROMPT)
        np.testing.assert_array_equal(next(rows), in_memory["lowrank"][0])
        os.kill(engine.statistics.workers()[0].pid, signal.SIGKILL)
        # An error, or another worker takes its place.
        with contextlib.suppress(WarmfrontError):
            assert_all(rows, in_memory["lowrank"][1:])
