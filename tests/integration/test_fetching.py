"""How rows are fetched is measured once, used by all, and changes no bit.  pytest tests/integration/test_fetching.py"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration.command import assert_refused, link_cache, prepack, run
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.hardware.fetching import CANDIDATES, choices_file, every_use, keep
from warmfront.shared.kernels.fetching import MATRIX_ROWS, Use
from warmfront.shared.model.formats import Kind

USE = Use(MATRIX_ROWS, int(Kind.Q8))
NOTE = "measuring how this memory is best read (first run only)\n"


@pytest.fixture(scope="module")
def model(compiled: None, tiny_llama: Callable[..., Path]) -> Path:
    return prepack(tiny_llama(hidden_act="relu"), "q8")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An $XDG_CACHE_HOME in which everything is ready, but nothing was measured."""
    packed = choices_file().parent
    link_cache(tmp_path)
    for part in ("models", "sources"):
        shutil.copytree(packed / part, tmp_path / "warmfront" / part)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    choices_file().unlink()
    return tmp_path


def test_the_first_start_measures_what_it_reads(home: Path, model: Path) -> None:
    command = ["generate", "-m", model, "--dtype", "q8", "-p", "The sea", "-n", "4"]
    untuned = run(*command, "--no-tuning")
    assert not choices_file().exists()
    first, second = run(*command), run(*command)
    assert (first.code, second.code) == (0, 0), first
    assert (untuned.err, first.err) == ("profiling which neurons fire (first load only)\n", NOTE)
    assert (second.out, second.err) == (first.out, "")
    assert untuned.out == first.out
    (choices,) = json.loads(choices_file().read_text()).values()
    assert set(choices) == {"matrix q8", "cached f16", "gates q8", "scattered q8"}
    assert NOTE in run(*command, "--selector", "lowbit").err
    (more,) = json.loads(choices_file().read_text()).values()
    assert more == choices | {"lowbit 2 bits": more["lowbit 2 bits"]}


def test_no_bit_depends_on_it(home: Path, model: Path) -> None:
    for selector in ("all", "exact", "lowbit"):
        results = set()
        for number in (0, 1, -1):
            choices = {use: CANDIDATES[use.access][number] for use in every_use()}
            for cores in range(1, len(os.sched_getaffinity(0)) + 1):
                keep(range(cores), choices)
            with Engine.load(str(model), dtype="q8", selector=selector) as engine:
                results.add(np.array(list(engine.forced_logits(range(40, 60), 4))).tobytes())
                assert engine.session.runtime._distances[USE] == CANDIDATES[USE.access][number].ahead
        assert len(results) == 1


def test_tune_kernels(home: Path) -> None:
    outcome = run("tune", "--kernels", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    facts = json.loads(outcome.out)
    rows = facts["rows"]
    assert facts["bandwidth"] > 0.1
    assert [f"{row['access']} {row['type']}" for row in rows] == [str(use) for use in every_use()]
    for row in rows:
        choice = {"ahead": row["ahead"], "announced": row["announced"]}
        assert choice in [{name: each[name] for name in choice} for each in row["measured"]]
        assert all(each["gb_s"] > 0.01 for each in row["measured"])
    assert facts["file"] == str(choices_file())
    (choices,) = json.loads(choices_file().read_text()).values()
    assert choices == {f"{row['access']} {row['type']}": [row["ahead"], row["announced"]] for row in rows}


@pytest.mark.parametrize("others", [["--exhaustive"], ["some-model"], ["--dtype", "q8"]])
def test_tune_kernels_is_for_every_model(others: list[str]) -> None:
    assert_refused(run("tune", "--kernels", *others), 2, "--kernels", "leave", others[0].strip("-").partition("-")[2])
