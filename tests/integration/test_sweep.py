"""`warmfront bench --sweep`: a row for each selector and limit.  pytest tests/integration/test_sweep.py"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.command import assert_refused, prepack, run, run_anew

pytestmark = pytest.mark.usefixtures("compiled")


def test_sweep(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model, plot = prepack(tiny_llama(hidden_act="relu")), tmp_path / "plot.png"
    options = [
        "--selectors=all,lowbit:0.8",
        "--vram-budgets=0,300KB",
        "--gpu=host",
        "--contexts=8",
        "-n4",
        "--rounds=1",
    ]
    outcome = run_anew("bench", model, "--sweep", *options, "--plot", plot, timeout=120)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out.splitlines()[-1])
    rows = {(row["selector"], row["vram_budget"]): row for row in result["rows"]}
    assert list(rows) == [(wish, limit) for wish in ("all", "lowbit:0.8") for limit in (0, 300_000)]
    for (selector, limit), row in rows.items():
        assert 0 < row["decode_range"][0] <= row["decode_tps"] <= row["decode_range"][1]
        assert row["memory"] > 10e6
        assert (row["device_memory"] > 0) == (limit > 0)
        assert (row["computed"] == 1) == (selector == "all")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plot=x.png"], ["--plot", "--sweep"]),
        (["--vram-budgets=1GB"], ["--vram-budgets", "--sweep"]),
        (["--sweep", "--vram-budgets=much"], ["'much' is not a size"]),
        (["--sweep", "--selectors=some"], ["'some'", "lowrank"]),
        (["--sweep", "--plot=absent/x.png"], ["there is no folder absent"]),
    ],
)
def test_refusals(options: list[str], words: list[str]) -> None:
    assert_refused(run("bench", "no-model", *options), 2, *words)
