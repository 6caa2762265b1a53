"""What a plan is said to be worth, and how it is shown.  pytest tests/coordinator/cli/test_plan.py"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shared.model.specs import SPEC, changed
from warmfront.coordinator.cli.plan import PlanInputs, draw, experts_of, figures_of, make_plan, render
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.placement.expected_load import firing_of, load_of, neurons_of
from warmfront.coordinator.placement.solver import DeviceCosts
from warmfront.shared.model.architecture import Experts
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import LOWRANK, selector_of

# Rows of 64 float32: 256 bytes; 3 whole groups and 8 neurons of a fourth.
LAYOUT = BundleLayout(hidden=64, ffn=104, gate_kind=Kind.F32, down_kind=Kind.F32)
FIRING = np.array([[20.0, 4.0, 2.0, 1.0], [8.0, 8.0, 0.5, 0.0]])


def inputs(slots: int, costs: DeviceCosts | None = None) -> PlanInputs:
    ledger = {"slots": slots * LAYOUT.group_bytes + 5, "activations": 700, "partials": 30}
    load = load_of(LAYOUT, LOWRANK, FIRING)
    costs, spec = costs or DeviceCosts(100, 0.5, 0, 0.001), changed(SPEC, "ffn", LAYOUT.ffn)
    return PlanInputs(LAYOUT, FIRING, load, costs, 10**6, ledger, spec)


def test_neurons_without_padding() -> None:
    assert neurons_of(LAYOUT).tolist() == [32, 32, 32, 8]


@pytest.mark.parametrize(
    ("selector", "rows"),
    [
        ("lowrank", 3 * FIRING),  # gate, up and down of those that fire
        ("lowbit", 3 * FIRING),
        ("exact", 32 + 2 * FIRING),  # every gate, padding included
        ("all", np.full((2, 4), 96.0)),
    ],
)
def test_load_by_selector(selector: str, rows: Any) -> None:
    np.testing.assert_allclose(load_of(LAYOUT, selector_of(selector), FIRING), 256 * rows)


def test_without_a_profile_every_neuron_fires(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with PackedModel(ensure_packed(tiny_gguf(), "auto", print, lambda *_: None)) as model:
        np.testing.assert_array_equal(firing_of(model), np.full((1, 16), 32.0))


def test_figures_by_hand() -> None:
    gpu = np.array([[True, False, False, True], [False, False, False, False]])
    figures = figures_of(inputs(3), gpu)
    assert figures["slots"] == 3
    assert figures["groups"] == 2
    assert figures["left_bytes"] == 10**6 - 3 * LAYOUT.group_bytes - 735
    assert figures["neurons"] == pytest.approx(40 / 208)
    assert figures["firing"] == pytest.approx(21 / 43.5)
    first, second = figures["layers"]
    assert (first["groups"], second["groups"]) == (2, 0)
    assert first["neurons"] == pytest.approx(40 / 104)
    assert first["firing"] == pytest.approx(21 / 27)
    assert second["neurons"] == second["firing"] == 0
    # 768 bytes for each neuron that fires, half a ns for a byte.
    assert first["plan_ns"] == pytest.approx(100 + 0.5 * 768 * 6)
    assert first["cpu_ns"] == pytest.approx(100 + 0.5 * 768 * 27)
    assert first["uniform_ns"] == pytest.approx(100 + 0.5 * 768 * 3)  # two groups of the first layer, one of the second
    assert second["uniform_ns"] == pytest.approx(100 + 0.5 * 768 * 8.5)
    for name in ("plan_ns", "cpu_ns", "uniform_ns"):
        assert figures[name] == pytest.approx(first[name] + second[name])


def test_a_plan_takes_the_best_groups_and_says_how_good_it_is() -> None:
    gpu, figures = make_plan(inputs(3), exact=True)
    assert np.argwhere(gpu).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert figures["exact"]["ns"] == pytest.approx(figures["plan_ns"])
    assert figures["exact"]["plan_above"] == pytest.approx(0, abs=1e-4)
    assert "exact" not in make_plan(inputs(3), exact=False)[1]


def shown(slots: int, width: int = 80, costs: DeviceCosts | None = None, exact: bool = False) -> list[str]:
    _, figures = make_plan(inputs(slots, costs), exact)
    return list(render({"model": "m", "selector": "lowrank", "device": "host"} | figures, width))


def test_the_chart() -> None:
    lines = shown(3, exact=True)
    assert lines[0] == "m · lowrank · host"
    assert any(f"3 x {LAYOUT.group_bytes} bytes" in line for line in lines)
    at = next(i for i, line in enumerate(lines) if line.startswith("layer  neurons"))
    assert lines[at + 1].split() == ["0", 9 * "#" + 19 * ".", "30.8%", 21 * "#" + 7 * ".", "74.1%"]
    assert lines[at + 2].split()[-3:] == ["61.5%", 27 * "#" + ".", "97.0%"]
    assert "on the GPU: 3 groups, 46.2% of the neurons, 82.8% of the firing" in lines
    assert any(line.startswith("  CPU alone: ") and line.endswith("x as long") for line in lines)
    assert any("at most 0.00% above the optimum" in line for line in lines)


@pytest.mark.parametrize(("shared", "gated"), [(0, False), (64, False), (64, True)])
def test_experts_of_a_plan(shared: int, gated: bool) -> None:
    """Of two groups each, in two layers."""
    experts = Experts(number=3, active=1, shared=shared, shared_gate=gated)
    spec = changed(changed(SPEC, "architecture.feed_forward.experts", experts), "ffn", 40)
    gpu = np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1]], bool)
    if shared:
        gpu = np.hstack((gpu, [[True, True], [True, False]]) if gated else ([[True, True], [True, False]], gpu))
    found = experts_of(spec, gpu)["experts"]
    assert found == {"whole": 3, "part": 2, "of": 6, "shared": 0.75 if shared else None}
    assert experts_of(SPEC, gpu) == {}
    figures = make_plan(inputs(3), exact=False)[1] | {"experts": found}
    lines = list(render({"model": "m", "selector": "all", "device": "host"} | figures, 80))
    assert any(line.startswith("  3 of 6 experts whole, 2 in part") for line in lines)


def test_layers_without_experts_of_a_plan() -> None:
    """They have no experts, and fewer groups with weights than the others."""
    experts = Experts(number=2, active=1, dense_layers=(0,), dense=64)
    spec = changed(changed(SPEC, "architecture.feed_forward.experts", experts), "ffn", 52)
    gpu = np.array([[1, 1, 0, 0], [1, 0, 1, 1]], bool)
    assert experts_of(spec, gpu)["experts"] == {"whole": 1, "part": 1, "of": 2, "shared": None}
    layout = BundleLayout(hidden=64, ffn=128, gate_kind=Kind.F32, down_kind=Kind.F32)
    figures = figures_of(inputs(3)._replace(layout=layout, spec=spec), gpu)
    assert [layer["neurons"] for layer in figures["layers"]] == [1, 0.75]
    assert figures["neurons"] == pytest.approx(160 / 192)


@pytest.mark.parametrize("width", [1, 40, 60, 80, 93, 250])
def test_bars_keep_to_the_width(width: int) -> None:
    lines = shown(3, width)
    at = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    bars = lines[at : at + 3]
    assert max(map(len, bars)) <= max(width, 31)
    assert len({len(line) for line in bars[1:]}) == 1
    assert width > 100 or width < 31 or len(bars[1]) >= width - 1


def test_what_is_said_of_a_plan_that_uses_not_all() -> None:
    for costs, why in ((DeviceCosts(0, 0.5, 1e9, 0.001), "its job"), (DeviceCosts(0, 0.5, 0, 0.6), "a byte")):
        (line,) = (line for line in shown(3, costs=costs) if line.startswith("nothing pays"))
        assert why in line
    full = shown(8)
    assert any("1 slots stay empty" in line for line in full), full
    assert not any("empty" in line or "nothing pays" in line for line in shown(3))


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib opens its fonts once and keeps them open, which is not a leak of a test."""
    _, figures = make_plan(inputs(1), exact=False)
    draw({"model": "m"} | figures, tmp_path_factory.mktemp("fonts") / "plan.png")


@pytest.mark.usefixtures("fonts")
def test_the_picture(tmp_path: Path) -> None:
    _, figures = make_plan(inputs(3), exact=False)
    path = tmp_path / "plan.anything"
    draw({"model": "m"} | figures, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
