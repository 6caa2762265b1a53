"""Workers that the run can do without.  pytest tests/coordinator/workers/test_lifecycle_optional.py"""

import pytest

from tests.coordinator.workers.lifecycle_bench import (
    ASSIGNMENTS,
    HELLOS,
    READY,
    REPORT,
    Machine,
    both_beat,
    failed,
)
from warmfront.coordinator.workers.events import (
    Abort,
    Assigned,
    DeliverMoved,
    DeliverReport,
    Event,
    Exited,
    Finished,
    Kill,
    MakeAssignments,
    Received,
    ReportProgress,
    RestartRequested,
    SendMessage,
    Start,
    StopRequested,
    Terminate,
    WorkerLost,
    WorkerRejoined,
)
from warmfront.coordinator.workers.lifecycle import RESTARTS, Phase
from warmfront.shared.wire.messages import (
    PROTOCOL,
    Failure,
    Heartbeat,
    Hello,
    Message,
    Moved,
    Progress,
    Shutdown,
)

OPTIONAL = ("gpu0",)
ENDS: dict[str, Event] = {
    "exits": Exited("gpu0", 1),
    "is killed": Exited("gpu0", -9),
    "fails": Received("gpu0", Failure("ResourceError", "out of memory")),
    "talks nonsense": Received("gpu0", Shutdown()),
}
LINES = {
    "exits": "worker gpu0 exited with code 1 while generating: see its output above",
    "is killed": "worker gpu0 was killed by signal 9 while generating: the machine may be out of memory (see dmesg)",
    "fails": "worker gpu0: out of memory",
    "talks nonsense": "worker gpu0 sent Shutdown while generating: not expected there",
}


def lose(machine: Machine, returncode: int = -9) -> None:
    """Let the optional worker's process end, whatever stage it is in, while the others serve."""
    (lost,) = machine.take(Exited("gpu0", returncode))
    assert isinstance(lost, WorkerLost)
    assert lost.worker == "gpu0"
    assert machine.phase() is Phase.READY


def come_back(machine: Machine) -> None:
    """Let the optional worker, which has been started again, get ready."""
    assert machine.hear("gpu0", HELLOS["gpu0"]) == [MakeAssignments({"gpu0": HELLOS["gpu0"]})]
    assert machine.take(Assigned({"gpu0": ASSIGNMENTS["gpu0"]})) == [SendMessage("gpu0", ASSIGNMENTS["gpu0"])]
    assert machine.hear("gpu0", Progress(0, 0)) == [ReportProgress(0, 0)]
    assert machine.hear("gpu0", READY) == [WorkerRejoined("gpu0", READY)]


@pytest.mark.parametrize("end", ENDS)
def test_an_optional_worker_is_lost_once_its_process_is_gone(end: str) -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    instructions = machine.take(ENDS[end])
    if not isinstance(ENDS[end], Exited):
        assert instructions == [Kill("gpu0")]
        assert machine.lifecycle.serving() == ["cpu0"]
        assert machine.wait(30, ("cpu0", Heartbeat())) == [], "nobody expects a sign of it"
        instructions = machine.take(Exited("gpu0", -9))
    (lost,) = instructions
    assert isinstance(lost, WorkerLost)
    assert lost.worker == "gpu0"
    assert str(lost.error) == LINES[end]
    assert machine.lifecycle.serving() == ["cpu0"]
    assert machine.phase() is Phase.READY
    assert machine.lifecycle.error is None
    assert machine.wait(100, ("cpu0", Heartbeat())) == []


def test_a_silent_optional_worker_is_killed_and_lost() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    assert machine.wait(19.75, ("cpu0", Heartbeat())) == []
    assert machine.wait(0.25, ("cpu0", Heartbeat())) == [Kill("gpu0")]
    (lost,) = machine.take(Exited("gpu0", -9))
    assert isinstance(lost, WorkerLost)
    assert str(lost.error) == "worker gpu0 stopped answering"


def test_nothing_that_a_lost_worker_says_counts() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    machine.hear("gpu0", Failure("ResourceError", "out of memory"))
    for message in (Moved(1, 1), REPORT, Heartbeat(), READY, HELLOS["gpu0"], Failure("ModelError", "me too")):
        assert machine.hear("gpu0", message) == []
    assert machine.hear("cpu0", Moved(2, 1)) == [DeliverMoved("cpu0", Moved(2, 1))]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.ASSIGNING, Phase.LOADING])
def test_nobody_is_optional_while_loading(phase: Phase) -> None:
    machine = Machine(phase, OPTIONAL)
    error = failed(machine.take(Exited("gpu0", -9)))
    assert str(error).startswith(f"worker gpu0 was killed by signal 9 {phase.value}: ")
    assert machine.phase() is Phase.STOPPING


def test_an_optional_worker_that_is_ready_before_the_others_is_not_optional_yet() -> None:
    machine = Machine(Phase.LOADING, OPTIONAL)
    machine.hear("gpu0", READY)
    assert "killed by signal 9" in str(failed(machine.take(Exited("gpu0", -9))))


@pytest.mark.parametrize("end", ENDS.values())
def test_a_worker_that_is_not_optional_is_still_the_end(end: Event) -> None:
    machine = Machine(Phase.READY, ("cpu0",))
    failed(machine.take(end))
    assert machine.phase() is Phase.STOPPING


def test_a_lost_worker_is_started_again_only_when_asked_for() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    lose(machine)
    assert machine.wait(10, ("cpu0", Heartbeat())) == []
    assert machine.take(RestartRequested("gpu0")) == [Start("gpu0")]
    assert machine.lifecycle.serving() == ["cpu0"]
    assert machine.take(RestartRequested("gpu0")) == [], "there is one already"
    come_back(machine)
    assert machine.lifecycle.serving() == ["cpu0", "gpu0"]
    assert machine.hear("gpu0", Moved(1, 1)) == [DeliverMoved("gpu0", Moved(1, 1))]
    assert machine.wait(100, *both_beat()) == []


def test_a_restart_waits_for_the_old_process_to_exit() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    assert machine.hear("gpu0", Failure("ResourceError", "out of memory")) == [Kill("gpu0")]
    assert machine.take(RestartRequested("gpu0")) == []
    lost, start = machine.take(Exited("gpu0", 1))
    assert isinstance(lost, WorkerLost)
    assert start == Start("gpu0")


def test_a_worker_is_started_again_only_so_often_in_a_row() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    lose(machine)
    for _ in range(RESTARTS):
        assert machine.take(RestartRequested("gpu0")) == [Start("gpu0")]
        machine.hear("gpu0", HELLOS["gpu0"])
        lose(machine, 1)
    assert machine.take(RestartRequested("gpu0")) == []
    assert machine.wait(100, ("cpu0", Heartbeat())) == []
    assert machine.hear("cpu0", REPORT) == [DeliverReport("cpu0", REPORT)]


def test_one_that_was_ready_between_may_be_started_as_often_again() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    for _ in range(3):
        for _ in range(RESTARTS):
            lose(machine)
            assert machine.take(RestartRequested("gpu0")) == [Start("gpu0")]
        come_back(machine)


@pytest.mark.parametrize(
    ("limit", "heard", "line"),
    [
        (30, [], "worker gpu0 did not start within 30 s"),
        (20, [HELLOS["gpu0"]], "worker gpu0 stopped answering"),
    ],
)
def test_a_restarted_worker_has_the_same_limits(limit: int, heard: list[Message], line: str) -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    machine.wait(7, *both_beat())
    lose(machine)
    machine.take(RestartRequested("gpu0"))
    for message in heard:
        machine.hear("gpu0", message)
    assert machine.wait(limit - 0.25, ("cpu0", Heartbeat())) == []
    assert machine.wait(0.25, ("cpu0", Heartbeat())) == [Kill("gpu0")]
    (lost,) = machine.take(Exited("gpu0", -9))
    assert isinstance(lost, WorkerLost)
    assert str(lost.error) == line


def test_a_restarted_worker_of_another_protocol_is_lost() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    lose(machine)
    machine.take(RestartRequested("gpu0"))
    assert machine.hear("gpu0", Hello("token", "gpu0", 1, "cpu", 1, PROTOCOL + 1)) == [Kill("gpu0")]
    (lost,) = machine.take(Exited("gpu0", -9))
    assert isinstance(lost, WorkerLost)
    assert "reinstall warmfront" in str(lost.error)


def test_stop_while_a_worker_is_lost() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    lose(machine)
    assert machine.take(StopRequested()) == [SendMessage("cpu0", Shutdown())]
    assert machine.take(RestartRequested("gpu0")) == []
    assert machine.take(Exited("cpu0", 0)) == [Finished(None)]


def test_stop_while_a_worker_starts_again() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    lose(machine)
    machine.take(RestartRequested("gpu0"))
    assert machine.take(StopRequested()) == [SendMessage("cpu0", Shutdown()), Terminate("gpu0")]
    assert machine.take(Exited("cpu0", 0)) == []
    assert machine.take(Exited("gpu0", -15)) == [Finished(None)]


def test_stop_while_a_failed_worker_has_not_gone_yet() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    machine.hear("gpu0", Failure("ResourceError", "out of memory"))
    assert machine.take(StopRequested()) == [SendMessage("cpu0", Shutdown()), Terminate("gpu0")]
    assert machine.take(Exited("gpu0", -9)) == []
    assert machine.take(Exited("cpu0", 0)) == [Finished(None)]
    assert machine.phase() is Phase.STOPPED


def test_another_worker_dies_while_one_is_lost() -> None:
    machine = Machine(Phase.READY, OPTIONAL)
    lose(machine)
    machine.take(RestartRequested("gpu0"))
    abort, terminate = machine.take(Exited("cpu0", -9))
    assert isinstance(abort, Abort)
    assert terminate == Terminate("gpu0")
    assert machine.take(Exited("gpu0", -15)) == [Finished(abort.error)]


def test_one_that_is_required_must_come_back() -> None:
    """It is lost as others are; but if no process gets ready in its place, that is the end."""
    machine = Machine(Phase.READY, OPTIONAL, required=OPTIONAL)
    lose(machine)
    for turn in range(RESTARTS):
        assert machine.take(RestartRequested("gpu0")) == [Start("gpu0")]
        if turn == 1:
            come_back(machine)
            lose(machine)
            assert machine.take(RestartRequested("gpu0")) == [Start("gpu0")]
        machine.hear("gpu0", HELLOS["gpu0"])
        lose(machine, 3)
    assert machine.take(RestartRequested("gpu0")) == [Start("gpu0")], "of three in a row two have failed"
    lose(machine, 3)
    error = failed(machine.take(RestartRequested("gpu0")))
    assert str(error) == "worker gpu0 exited with code 3 while generating: see its output above"
    assert machine.phase() is Phase.STOPPING
