"""The lifecycle, event by event, in made-up time.  pytest tests/coordinator/workers/test_lifecycle.py"""

import pytest

from tests.coordinator.workers.lifecycle_bench import (
    ASSIGNMENTS,
    HELLOS,
    NAMES,
    READY,
    REPORT,
    Machine,
    both_beat,
    failed,
)
from warmfront.coordinator.workers.events import (
    Abort,
    AnnounceReady,
    Assigned,
    DeliverMoved,
    DeliverReport,
    Exited,
    Finished,
    Kill,
    MakeAssignments,
    ReportProgress,
    SendMessage,
    StopRequested,
    Terminate,
    Tick,
)
from warmfront.coordinator.workers.lifecycle import Lifecycle, Phase
from warmfront.shared.errors import ModelError, ProtocolError, WorkerError
from warmfront.shared.wire.messages import (
    PROTOCOL,
    Failure,
    Heartbeat,
    Hello,
    Message,
    Move,
    Moved,
    Progress,
    Ready,
    ReportRequest,
    Shutdown,
)


def test_a_whole_life() -> None:
    machine = Machine()
    assert machine.hear("gpu0", HELLOS["gpu0"]) == []
    assert machine.phase() is Phase.STARTING
    assert machine.hear("cpu0", HELLOS["cpu0"]) == [MakeAssignments(HELLOS)]
    assert machine.phase() is Phase.ASSIGNING
    assert machine.take(Assigned(ASSIGNMENTS)) == [SendMessage(name, ASSIGNMENTS[name]) for name in NAMES]
    assert machine.phase() is Phase.LOADING
    assert machine.hear("cpu0", Progress(0, 100)) == [ReportProgress(0, 100)]
    assert machine.hear("gpu0", Progress(5, 50)) == [ReportProgress(5, 150)]
    assert machine.hear("cpu0", Progress(60, 100)) == [ReportProgress(65, 150)]
    readies = {"cpu0": Ready(4, {}), "gpu0": Ready(5, {"slots": 222})}
    assert machine.hear("cpu0", readies["cpu0"]) == []
    assert machine.hear("gpu0", Heartbeat()) == []
    assert machine.phase() is Phase.LOADING
    assert machine.lifecycle.serving() == ["cpu0"]
    assert machine.hear("gpu0", readies["gpu0"]) == [AnnounceReady(readies)]
    assert machine.lifecycle.serving() == ["cpu0", "gpu0"]
    assert machine.phase() is Phase.READY
    assert machine.hear("cpu0", REPORT) == [DeliverReport("cpu0", REPORT)]
    assert machine.hear("gpu0", Moved(3, 4)) == [DeliverMoved("gpu0", Moved(3, 4))]
    assert machine.hear("cpu0", Moved(3, 4)) == [DeliverMoved("cpu0", Moved(3, 4))]
    assert machine.wait(100, *both_beat()) == []
    assert machine.take(StopRequested()) == [SendMessage(name, Shutdown()) for name in NAMES]
    assert machine.phase() is Phase.STOPPING
    assert machine.take(Exited("cpu0", 0)) == []
    assert machine.take(Exited("gpu0", 0)) == [Finished(None)]
    assert machine.phase() is Phase.STOPPED
    assert machine.lifecycle.error is None
    assert machine.wait(100) == []


@pytest.mark.parametrize(
    ("phase", "returncode", "line"),
    [
        (Phase.STARTING, 1, "worker cpu0 exited with code 1 while starting: see its output above"),
        (Phase.ASSIGNING, 0, "worker cpu0 exited with code 0 while waiting for its assignment: see its output above"),
        (
            Phase.LOADING,
            -9,
            "worker cpu0 was killed by signal 9 while loading the model: the machine may be out of memory (see dmesg)",
        ),
        (Phase.READY, -11, "worker cpu0 was killed by signal 11 while generating: see its output above"),
    ],
)
def test_a_worker_that_exits_is_a_failure_told_once(phase: Phase, returncode: int, line: str) -> None:
    machine = Machine(phase)
    instructions = machine.take(Exited("cpu0", returncode))
    error = failed(instructions)
    assert type(error) is WorkerError
    assert str(error) == line
    ask = SendMessage("gpu0", Shutdown()) if phase is Phase.READY else Terminate("gpu0")
    assert instructions[1:] == [ask]
    assert machine.phase() is Phase.STOPPING
    assert machine.take(Exited("gpu0", 0)) == [Finished(error)]
    assert machine.phase() is Phase.FAILED
    assert machine.lifecycle.error is error


def test_the_last_worker_exits_by_itself() -> None:
    lifecycle = Lifecycle(["cpu0"], 0)
    abort, finished = lifecycle.handle(Exited("cpu0", 3), 0)
    assert isinstance(abort, Abort)
    assert finished == Finished(abort.error)
    assert lifecycle.phase is Phase.FAILED


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.ASSIGNING, Phase.LOADING, Phase.READY])
def test_a_failure_message_keeps_its_class(phase: Phase) -> None:
    machine = Machine(phase)
    error = failed(machine.hear("gpu0", Failure("ModelError", "no such tensor")))
    assert type(error) is ModelError
    assert str(error) == "worker gpu0: no such tensor"
    assert machine.hear("cpu0", Failure("ModelError", "me too")) == []
    assert machine.take(Exited("gpu0", 1)) == []
    assert machine.take(Exited("cpu0", 1)) == [Finished(error)]
    assert machine.lifecycle.error is error


def test_the_ladder() -> None:
    machine = Machine(Phase.READY)
    assert machine.take(StopRequested()) == [SendMessage(name, Shutdown()) for name in NAMES]
    assert machine.wait(0.75) == []
    assert machine.wait(0.25) == [Terminate("cpu0"), Terminate("gpu0")]
    assert machine.take(Exited("cpu0", -15)) == []
    assert machine.wait(0.25) == []
    assert machine.wait(0.25) == [Kill("gpu0")]
    assert machine.wait(100) == []
    assert machine.take(Exited("gpu0", -9)) == [Finished(None)]
    assert machine.phase() is Phase.STOPPED


def test_the_ladder_after_a_failure() -> None:
    machine = Machine(Phase.LOADING)
    error = failed(machine.take(Exited("gpu0", 1)))
    assert machine.wait(1.0) == [Terminate("cpu0")]
    assert machine.wait(0.5) == [Kill("cpu0")]
    assert machine.take(Exited("cpu0", -9)) == [Finished(error)]


def test_stop_before_every_worker_has_started() -> None:
    machine = Machine()
    machine.hear("gpu0", HELLOS["gpu0"])
    assert machine.take(StopRequested()) == [Terminate("cpu0"), Terminate("gpu0")]
    assert machine.hear("cpu0", HELLOS["cpu0"]) == []
    assert machine.take(StopRequested()) == []
    assert machine.take(Exited("cpu0", -15)) == []
    assert machine.take(Exited("gpu0", 0)) == [Finished(None)]


def test_assignments_that_come_too_late_are_dropped() -> None:
    machine = Machine(Phase.ASSIGNING)
    machine.take(StopRequested())
    assert machine.take(Assigned(ASSIGNMENTS)) == []
    assert machine.phase() is Phase.STOPPING


@pytest.mark.parametrize(
    "message", [Heartbeat(), READY, REPORT, HELLOS["cpu0"], Failure("ModelError", "x"), Shutdown()]
)
def test_nothing_a_worker_says_counts_while_stopping(message: Message) -> None:
    machine = Machine(Phase.STOPPING)
    assert machine.hear("cpu0", message) == []
    assert machine.hear("stranger", message) == []
    assert machine.lifecycle.error is None


def test_no_hello_within_30_seconds() -> None:
    machine = Machine()
    machine.hear("cpu0", HELLOS["cpu0"])
    assert machine.wait(29.75, ("cpu0", Heartbeat())) == []
    instructions = machine.wait(0.25, ("cpu0", Heartbeat()))
    assert str(failed(instructions)) == "worker gpu0 did not start within 30 s"
    assert instructions[1:] == [Terminate("cpu0"), Terminate("gpu0")]


def test_no_progress_for_120_seconds_though_the_heart_beats() -> None:
    machine = Machine(Phase.LOADING)
    machine.wait(50, *both_beat())
    machine.hear("cpu0", Progress(0, 9))
    machine.hear("gpu0", Progress(0, 9))
    assert machine.wait(110, ("cpu0", Heartbeat())) == []
    machine.hear("cpu0", Progress(1, 9))
    assert machine.wait(9.75) == []
    error = failed(machine.wait(0.25))
    assert str(error) == "worker gpu0 made no progress for 120 s while loading the model"


def test_the_same_progress_again_does_not_count() -> None:
    machine = Machine(Phase.LOADING)
    machine.hear("gpu0", READY)
    machine.hear("cpu0", Progress(3, 9))
    stuck: list[tuple[str, Message]] = [("cpu0", Progress(3, 9)), ("gpu0", Heartbeat())]
    assert machine.wait(119.75, *stuck) == [ReportProgress(3, 9)] * 479
    _, *instructions = machine.wait(0.25, *stuck)
    assert "cpu0 made no progress" in str(failed(instructions))


def test_a_worker_that_compiles_is_waited_for_and_one_that_only_tells_is_not() -> None:
    machine = Machine(Phase.LOADING)
    machine.hear("gpu0", READY)
    for seconds in range(0, 600, 100):
        assert machine.wait(100, ("gpu0", Heartbeat()), ("cpu0", Progress(3, 9, seconds * 10**9)))
    # Since its last sign of life it has worked for less than two seconds.
    late: list[tuple[str, Message]] = [("cpu0", Progress(3, 9, 501_900_000_000)), ("gpu0", Heartbeat())]
    assert machine.wait(20, *late)
    _, *instructions = machine.wait(0.25, *late)
    assert "cpu0 made no progress" in str(failed(instructions))


@pytest.mark.parametrize("phase", [Phase.ASSIGNING, Phase.READY])
def test_silence_for_20_seconds(phase: Phase) -> None:
    machine = Machine(phase)
    machine.wait(40, *both_beat())
    assert machine.wait(19.75, ("gpu0", Heartbeat())) == []
    error = failed(machine.wait(0.25, ("gpu0", Heartbeat())))
    assert type(error) is WorkerError
    assert str(error) == "worker cpu0 stopped answering"


def test_each_stage_has_its_time_anew() -> None:
    machine = Machine(Phase.ASSIGNING)
    assert machine.wait(15) == []
    machine.take(Assigned(ASSIGNMENTS))
    assert machine.wait(59) == []
    machine.hear("cpu0", READY)
    machine.hear("gpu0", READY)
    assert machine.wait(19) == []


def test_a_worker_that_is_ready_before_the_others_must_not_fall_silent() -> None:
    machine = Machine(Phase.LOADING)
    machine.hear("cpu0", READY)
    assert machine.wait(19.75) == []
    assert str(failed(machine.wait(0.25))) == "worker cpu0 stopped answering"


def test_a_report_is_a_sign_of_life() -> None:
    machine = Machine(Phase.READY)
    machine.wait(15, ("gpu0", Heartbeat()))
    machine.hear("cpu0", REPORT)
    assert machine.wait(19.75, ("gpu0", Heartbeat())) == []


def test_a_coordinator_that_slept_does_not_blame_its_workers() -> None:
    machine = Machine(Phase.READY)
    machine.now += 3600
    assert machine.take(Tick()) == []
    assert machine.wait(18.75) == []
    assert "stopped answering" in str(failed(machine.wait(0.25)))


def test_time_that_runs_backwards_does_not_count() -> None:
    machine = Machine(Phase.READY)
    machine.now -= 1000
    assert machine.take(Tick()) == []
    assert machine.wait(19.75) == []
    assert "stopped answering" in str(failed(machine.wait(0.25)))


def test_wrong_protocol() -> None:
    machine = Machine()
    error = failed(machine.hear("cpu0", Hello("token", "cpu0", 1, "cpu", 1, PROTOCOL + 1)))
    assert type(error) is ProtocolError
    assert str(error) == f"worker cpu0 speaks protocol {PROTOCOL + 1}, not {PROTOCOL}: reinstall warmfront"


def test_double_hello() -> None:
    machine = Machine()
    machine.hear("cpu0", HELLOS["cpu0"])
    error = failed(machine.hear("cpu0", HELLOS["cpu0"]))
    assert type(error) is ProtocolError
    assert str(error) == "worker cpu0 sent Hello while starting: not expected there"


def test_hello_of_a_worker_that_was_not_started() -> None:
    machine = Machine()
    error = failed(machine.hear("cpu7", Hello("token", "cpu7", 1, "cpu", 1, PROTOCOL)))
    assert type(error) is ProtocolError
    assert "cpu7, which was not started" in str(error)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase.STARTING, Progress(0, 1)),
        (Phase.STARTING, READY),
        (Phase.ASSIGNING, READY),
        (Phase.ASSIGNING, REPORT),
        (Phase.LOADING, HELLOS["cpu0"]),
        (Phase.LOADING, REPORT),
        (Phase.ASSIGNING, Moved(1, 1)),
        (Phase.LOADING, Moved(1, 1)),
        (Phase.READY, HELLOS["cpu0"]),
        (Phase.READY, READY),
        (Phase.READY, Progress(1, 1)),
        (Phase.READY, ASSIGNMENTS["cpu0"]),
        (Phase.READY, Shutdown()),
        (Phase.READY, ReportRequest()),
        (Phase.READY, Move(1, b"")),
    ],
)
def test_a_message_out_of_turn(phase: Phase, message: Message) -> None:
    machine = Machine(phase)
    error = failed(machine.hear("cpu0", message))
    assert type(error) is ProtocolError
    assert str(error) == f"worker cpu0 sent {type(message).__name__} {phase.value}: not expected there"
