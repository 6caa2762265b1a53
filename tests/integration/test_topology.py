"""`warmfront topology` on this machine, and cpus that go away.  pytest tests/integration/test_topology.py"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import Outcome, assert_refused, prepack, run
from warmfront.shared.machine.numa import UNBOUND, bindable
from warmfront.shared.machine.topology import read_topology

# A machine with a cpu that this one has not: so it is when a cpuset shrinks between planning and pinning.
SHRUNK = """
from dataclasses import replace
from warmfront.coordinator.engine import resolve
from warmfront.coordinator.cli.main import main
from warmfront.shared.machine.topology import read_topology
real = read_topology()
node = replace(real.nodes[0], cores=(real.nodes[0].cores[0], (4000,)))
resolve.read_topology = lambda: replace(real, nodes=(node,))
main()
"""
# Plans that take memory of a node, though there is but one.
BOUND = """
from dataclasses import replace
from warmfront.coordinator.engine import resolve
from warmfront.shared.machine import numa
from warmfront.coordinator.cli.main import main
choose = resolve._plan_cores
def on_a_node(config):
    plan = choose(config)
    return plan if not config.pin else replace(plan, workers=tuple(w._replace(memory=w.node) for w in plan.workers))
resolve._plan_cores = on_a_node
"""
UNBINDABLE = """
import ctypes, errno
from warmfront.shared.machine import numa
class Refusing:
    def syscall(self, *_):
        ctypes.set_errno(errno.EPERM)
        return -1
numa._libc = Refusing()
"""


def generate(script: str, model: Path, *args: str) -> Outcome:
    """`warmfront generate` as a script has changed it."""
    command = [sys.executable, "-c", script, "generate", "-m", os.fspath(model), "-p", "The sea", "-n", "2", *args]
    done = subprocess.run([*command, "--no-tuning"], capture_output=True, text=True, timeout=60, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def model(compiled: None, tiny_llama: Callable[..., Path]) -> Path:
    return prepack(tiny_llama(hidden_act="relu"))


def facts(*args: str, **options: Any) -> dict[str, Any]:
    outcome = run("topology", "--json", *args, **options)
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (0, "", 1)
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_facts_agree_with_the_kernel() -> None:
    started = time.monotonic()
    found = facts("--no-measure")
    assert time.monotonic() - started < 10
    allowed = os.sched_getaffinity(0)
    assert {cpu for node in found["nodes"] for core in node["cores"] for cpu in core} == allowed
    planned = [cpu for worker in found["plan"]["workers"] for cpu in worker["cpus"]]
    assert sorted({*planned, *found["plan"]["unused"]}) == sorted(allowed)
    assert found["plan"]["coordinator"] == planned
    assert found["bandwidth"] == []
    assert 0 < found["available_bytes"] <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_smaller_mask() -> None:
    first = min(os.sched_getaffinity(0))
    found = facts("--no-measure", preexec_fn=lambda: os.sched_setaffinity(0, [first]))
    assert [node["cores"] for node in found["nodes"]] == [[[first]]]
    assert [worker["cpus"] for worker in found["plan"]["workers"]] == [[first]]


def test_lines() -> None:
    outcome = run("topology", "--no-measure")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("node ")
    assert "\nplan: worker cpu0 on node " in outcome.out
    assert "read bandwidth" not in outcome.out


@pytest.mark.slow
def test_measures_the_memory() -> None:
    rows = facts()["bandwidth"]
    assert rows
    assert all(row["gb_s"] > 0.1 for row in rows)


def test_wrong_options() -> None:
    assert_refused(run("topology", "--jsn"), 2, "--jsn")
    assert_refused(run("topology", "model"), 2, "model")


@pytest.mark.parametrize("args", [[], ["--coordinator-threads", "1"], ["--workers", "2"]], ids="_".join)
def test_a_cpu_that_goes_away_before_pinning(model: Path, args: list[str]) -> None:
    assert_refused(generate(SHRUNK, model, *args), 1, "cannot run on cpus [4000]", "check taskset and cpusets")


def test_a_cpu_that_goes_away_unpinned(model: Path) -> None:
    outcome = generate(SHRUNK, model, "--no-pin")
    assert (outcome.code, outcome.err) == (0, "")


def test_unbound_memory_is_said_once(model: Path) -> None:
    outcome = generate(f"{BOUND}{UNBINDABLE}main()", model)
    assert (outcome.code, outcome.err) == (0, f"{UNBOUND}\n")


@pytest.mark.skipif(not bindable([read_topology().nodes[0].id]), reason="a container without mbind")
def test_bound_weights_lie_on_their_node(model: Path) -> None:
    outcome = generate(f"{BOUND}main()", model, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    for worker in json.loads(outcome.out)["workers"]:
        (name,) = worker["nodes"]
        assert name in {f"node{node.id}" for node in read_topology().nodes}
        assert worker["nodes"][name] > 0


def test_a_node_that_is_too_small(model: Path) -> None:
    outcome = generate(f"{BOUND}numa.free_on = lambda node: 1000\nmain()", model)
    assert_refused(outcome, 1, "is to hold", "but has 0.0 GB free")
    anywhere = generate(f"{BOUND}numa.free_on = lambda node: 1000\nmain()", model, "--no-pin")
    assert anywhere.code == 0, anywhere
    unbound = generate(f"{BOUND}{UNBINDABLE}numa.free_on = lambda node: 1000\nmain()", model)
    assert (unbound.code, unbound.err) == (0, f"{UNBOUND}\n"), "elsewhere there is room"
