"""Progress bars on terminals of all widths.  pytest tests/coordinator/cli/test_terminal.py"""

import io
import re

import pytest

from warmfront.coordinator.cli.plan import _bars
from warmfront.coordinator.cli.terminal import Bars
from warmfront.coordinator.measure import bench


class FakeTerminal(io.StringIO):
    """Collects what is drawn, and claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> FakeTerminal:
    """A terminal in place of stderr from now on."""
    shown = FakeTerminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", columns)
    return shown


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 200])
def test_a_bar_stays_on_its_line(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    shown = terminal(monkeypatch, str(width))
    with Bars() as bars:
        for done in (0, 40_000_000, 100_000_000):
            bars.show("packing", done, 100_000_000)
        bars.count("counting", 1000, 20_000)
        bars.last("tuning", 20, 40)
    lines = re.split("\r(?=.)", shown.getvalue())[1:]
    drawn = [line for line in lines if line.strip()]
    assert len(drawn) == 5
    assert max(map(len, drawn)) < width
    assert lines[-1].strip() == ""
    assert lines[3].strip() == ""  # a full bar is wiped too
    whole = "packing [############..................] 40 of 100 MB"
    assert (whole in drawn[1]) == (width > len(whole))
    assert ("[" in drawn[1]) == (width >= 30)
    if width >= 30:
        assert re.search(r"\[#+\.+\] 40 of 100 MB", drawn[1])


@pytest.mark.parametrize("columns", ["", "0", "wide"])
def test_an_unknown_width_is_the_usual_one(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    shown = terminal(monkeypatch, columns)
    with Bars() as bars:
        bars.show("packing", 1, 2)
    assert f"[{'#' * 15}{'.' * 15}]" in shown.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_a_plan_stays_in_its_columns(width: int) -> None:
    layers = [{"neurons": 0.5, "firing": 1.0}] * 3
    lines = list(_bars({"layers": layers}, width))
    assert max(map(len, lines)) <= width
    assert len(lines) == 4


def test_a_benchmark_is_a_table_or_paragraphs() -> None:
    row = {"selector": "exact", "context": 16, "prefill_tps": 1234.5, "decode_tps": 99.9, "decode_range": [90.1, 100.0]}
    row |= {"read": 10.4, "bandwidth": 12.5, "roofline_share": 0.83}
    row |= {"bytes_per_token": {"attention": 1e8, "head": 2e7, "kv": 0}, "disk": {}}
    disk = {"bytes_per_token": 14.7e6, "reads_per_token": 1171, "bandwidth": 2.1e8, "roofline_tps": 14.3}
    disk |= {"hit_share": 0.93, "miss_share_p99": 0.1, "stall_ms_per_token": 19.2}
    rows = [row, row | {"disk": disk}]
    result = {"name": "model", "dtype": "q8", "threads": 2, "rounds": 5, "rows": rows}
    wide = list(bench.render(result, 250))
    assert len(wide) == 5
    for figure in ("14.7 MB", "1171 reads", "210 MB/s", "14.3 tok/s", "93.0%", "90%", "19.2 ms"):
        assert figure in wide[4]
    assert len(wide[2]) > 80
    narrow = list(bench.render(result, 40))[1:]
    assert max(map(len, narrow)) <= 40
    figures = ("exact", "16", "1234.5", "99.9", "90.1 to 100.0", "10.4", "12.5", "83%", "attention 100.0", "head 20.0")
    for figure in figures:
        assert any(figure in line for line in narrow)
        assert figure in wide[2]
