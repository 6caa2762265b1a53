"""The lifecycle, event by event, in made-up time.  pytest tests/coordinator/workers/test_lifecycle.py"""

import pytest

from warmfront.coordinator.workers.events import (
    Abort,
    AnnounceReady,
    DeliverMoved,
    DeliverReport,
    Event,
    Exited,
    Finished,
    Instruction,
    Kill,
    MakePlans,
    Planned,
    Received,
    ReportProgress,
    RestartRequested,
    SendMessage,
    Start,
    StopRequested,
    Terminate,
    Tick,
    WorkerLost,
    WorkerRejoined,
)
from warmfront.coordinator.workers.lifecycle import RESTARTS, Lifecycle, Phase
from warmfront.shared.errors import ModelError, ProtocolError, WarmfrontError, WorkerError
from warmfront.shared.wire.messages import (
    PROTOCOL,
    Failure,
    Heartbeat,
    Hello,
    LoadReport,
    Message,
    Move,
    Moved,
    Plan,
    Progress,
    Ready,
    ReportRequest,
    Shutdown,
)

NAMES = ("cpu0", "gpu0")
PLANS = {name: Plan(index, "m", "", [index], "all", b"", 0, 1.0, 0) for index, name in enumerate(NAMES)}
HELLOS = {name: Hello("token", name, 100, "cpu", 1 << 30, PROTOCOL) for name in NAMES}
READY = Ready(10, 2, {"slots": 8})
REPORT = LoadReport(1, [2], [3], [4], [])


class Machine:
    """A lifecycle with a clock that starts at an odd origin and ticks every quarter of a second."""

    def __init__(self, phase: Phase = Phase.STARTING, spare: tuple[str, ...] = ()) -> None:
        self.now = 1234.5
        self.lifecycle = Lifecycle(NAMES, self.now, spare)
        if phase is Phase.STARTING:
            return
        for name in NAMES:
            self.hear(name, HELLOS[name])
        if phase is not Phase.PLANNING:
            self.take(Planned(PLANS))
        if phase not in (Phase.PLANNING, Phase.LOADING):
            for name in NAMES:
                self.hear(name, READY)
        if phase is Phase.STOPPING:
            self.take(StopRequested())
        assert self.phase() is phase

    def phase(self) -> Phase:
        return self.lifecycle.phase

    def take(self, event: Event) -> list[Instruction]:
        return self.lifecycle.handle(event, self.now)

    def hear(self, worker: str, message: Message) -> list[Instruction]:
        return self.take(Received(worker, message))

    def wait(self, seconds: float, *heard: tuple[str, Message]) -> list[Instruction]:
        """Let time pass; `heard` is received before every tick."""
        instructions = []
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            for worker, message in heard:
                instructions += self.hear(worker, message)
            instructions += self.take(Tick())
        return instructions


def failed(instructions: list[Instruction]) -> WarmfrontError:
    """The error of a failure that asks both workers to leave (each as it can be asked)."""
    abort, *rest = instructions
    assert isinstance(abort, Abort)
    for each in rest:
        assert isinstance(each, Terminate) or (isinstance(each, SendMessage) and each.message == Shutdown())
    return abort.error


def both_beat() -> list[tuple[str, Message]]:
    return [(name, Heartbeat()) for name in NAMES]


def test_a_whole_life() -> None:
    machine = Machine()
    assert machine.hear("gpu0", HELLOS["gpu0"]) == []
    assert machine.phase() is Phase.STARTING
    assert machine.hear("cpu0", HELLOS["cpu0"]) == [MakePlans(HELLOS)]
    assert machine.phase() is Phase.PLANNING
    assert machine.take(Planned(PLANS)) == [SendMessage(name, PLANS[name]) for name in NAMES]
    assert machine.phase() is Phase.LOADING
    assert machine.hear("cpu0", Progress(0, 100)) == [ReportProgress(0, 100)]
    assert machine.hear("gpu0", Progress(5, 50)) == [ReportProgress(5, 150)]
    assert machine.hear("cpu0", Progress(60, 100)) == [ReportProgress(65, 150)]
    readies = {"cpu0": Ready(111, 4, {}), "gpu0": Ready(0, 5, {"slots": 222})}
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
        (Phase.PLANNING, 0, "worker cpu0 exited with code 0 while waiting for its plan: see its output above"),
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


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.PLANNING, Phase.LOADING, Phase.READY])
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


def test_plans_that_come_too_late_are_dropped() -> None:
    machine = Machine(Phase.PLANNING)
    machine.take(StopRequested())
    assert machine.take(Planned(PLANS)) == []
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


def test_no_progress_for_240_seconds_though_the_heart_beats() -> None:
    machine = Machine(Phase.LOADING)
    machine.wait(50, *both_beat())
    machine.hear("cpu0", Progress(0, 9))
    machine.hear("gpu0", Progress(0, 9))
    assert machine.wait(230, ("cpu0", Heartbeat())) == []
    machine.hear("cpu0", Progress(1, 9))
    assert machine.wait(9.75) == []
    error = failed(machine.wait(0.25))
    assert str(error) == "worker gpu0 made no progress for 240 s while loading the model"


def test_the_same_progress_again_is_none() -> None:
    machine = Machine(Phase.LOADING)
    machine.hear("gpu0", READY)
    machine.hear("cpu0", Progress(3, 9))
    stuck: list[tuple[str, Message]] = [("cpu0", Progress(3, 9)), ("gpu0", Heartbeat())]
    assert machine.wait(239.75, *stuck) == [ReportProgress(3, 9)] * 959
    _, *instructions = machine.wait(0.25, *stuck)
    assert "cpu0 made no progress" in str(failed(instructions))


@pytest.mark.parametrize("phase", [Phase.PLANNING, Phase.READY])
def test_silence_for_20_seconds(phase: Phase) -> None:
    machine = Machine(phase)
    machine.wait(40, *both_beat())
    assert machine.wait(19.75, ("gpu0", Heartbeat())) == []
    error = failed(machine.wait(0.25, ("gpu0", Heartbeat())))
    assert type(error) is WorkerError
    assert str(error) == "worker cpu0 stopped answering"


def test_each_stage_has_its_time_anew() -> None:
    machine = Machine(Phase.PLANNING)
    assert machine.wait(15) == []
    machine.take(Planned(PLANS))
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


def test_time_that_runs_backwards_is_no_time() -> None:
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
        (Phase.PLANNING, READY),
        (Phase.PLANNING, REPORT),
        (Phase.LOADING, HELLOS["cpu0"]),
        (Phase.LOADING, REPORT),
        (Phase.PLANNING, Moved(1, 1)),
        (Phase.LOADING, Moved(1, 1)),
        (Phase.READY, HELLOS["cpu0"]),
        (Phase.READY, READY),
        (Phase.READY, Progress(1, 1)),
        (Phase.READY, PLANS["cpu0"]),
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


SPARE = ("gpu0",)
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
    """Let the spare worker's process end, whatever stage it is in, while the others serve."""
    (lost,) = machine.take(Exited("gpu0", returncode))
    assert isinstance(lost, WorkerLost)
    assert lost.worker == "gpu0"
    assert machine.phase() is Phase.READY


def come_back(machine: Machine) -> None:
    """Let the spare worker, which has been started again, get ready."""
    assert machine.hear("gpu0", HELLOS["gpu0"]) == [MakePlans({"gpu0": HELLOS["gpu0"]})]
    assert machine.take(Planned({"gpu0": PLANS["gpu0"]})) == [SendMessage("gpu0", PLANS["gpu0"])]
    assert machine.hear("gpu0", Progress(0, 0)) == [ReportProgress(0, 0)]
    assert machine.hear("gpu0", READY) == [WorkerRejoined("gpu0", READY)]


@pytest.mark.parametrize("end", ENDS)
def test_a_spare_worker_is_lost_once_its_process_is_gone(end: str) -> None:
    machine = Machine(Phase.READY, SPARE)
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


def test_a_silent_spare_worker_is_killed_and_lost() -> None:
    machine = Machine(Phase.READY, SPARE)
    assert machine.wait(19.75, ("cpu0", Heartbeat())) == []
    assert machine.wait(0.25, ("cpu0", Heartbeat())) == [Kill("gpu0")]
    (lost,) = machine.take(Exited("gpu0", -9))
    assert isinstance(lost, WorkerLost)
    assert str(lost.error) == "worker gpu0 stopped answering"


def test_nothing_that_a_lost_worker_says_counts() -> None:
    machine = Machine(Phase.READY, SPARE)
    machine.hear("gpu0", Failure("ResourceError", "out of memory"))
    for message in (Moved(1, 1), REPORT, Heartbeat(), READY, HELLOS["gpu0"], Failure("ModelError", "me too")):
        assert machine.hear("gpu0", message) == []
    assert machine.hear("cpu0", Moved(2, 1)) == [DeliverMoved("cpu0", Moved(2, 1))]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.PLANNING, Phase.LOADING])
def test_nobody_is_spare_while_loading(phase: Phase) -> None:
    machine = Machine(phase, SPARE)
    error = failed(machine.take(Exited("gpu0", -9)))
    assert str(error).startswith(f"worker gpu0 was killed by signal 9 {phase.value}: ")
    assert machine.phase() is Phase.STOPPING


def test_a_spare_worker_that_is_ready_before_the_others_is_not_spare_yet() -> None:
    machine = Machine(Phase.LOADING, SPARE)
    machine.hear("gpu0", READY)
    assert "killed by signal 9" in str(failed(machine.take(Exited("gpu0", -9))))


@pytest.mark.parametrize("end", ENDS.values())
def test_a_worker_that_is_not_spare_is_still_the_end(end: Event) -> None:
    machine = Machine(Phase.READY, ("cpu0",))
    failed(machine.take(end))
    assert machine.phase() is Phase.STOPPING


def test_a_lost_worker_is_started_again_only_when_asked_for() -> None:
    machine = Machine(Phase.READY, SPARE)
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
    machine = Machine(Phase.READY, SPARE)
    assert machine.hear("gpu0", Failure("ResourceError", "out of memory")) == [Kill("gpu0")]
    assert machine.take(RestartRequested("gpu0")) == []
    lost, start = machine.take(Exited("gpu0", 1))
    assert isinstance(lost, WorkerLost)
    assert start == Start("gpu0")


def test_a_worker_is_started_again_only_so_often_in_a_row() -> None:
    machine = Machine(Phase.READY, SPARE)
    lose(machine)
    for _ in range(RESTARTS):
        assert machine.take(RestartRequested("gpu0")) == [Start("gpu0")]
        machine.hear("gpu0", HELLOS["gpu0"])
        lose(machine, 1)
    assert machine.take(RestartRequested("gpu0")) == []
    assert machine.wait(100, ("cpu0", Heartbeat())) == []
    assert machine.hear("cpu0", REPORT) == [DeliverReport("cpu0", REPORT)]


def test_one_that_was_ready_between_may_be_started_as_often_again() -> None:
    machine = Machine(Phase.READY, SPARE)
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
    machine = Machine(Phase.READY, SPARE)
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
    machine = Machine(Phase.READY, SPARE)
    lose(machine)
    machine.take(RestartRequested("gpu0"))
    assert machine.hear("gpu0", Hello("token", "gpu0", 1, "cpu", 1, PROTOCOL + 1)) == [Kill("gpu0")]
    (lost,) = machine.take(Exited("gpu0", -9))
    assert isinstance(lost, WorkerLost)
    assert "reinstall warmfront" in str(lost.error)


def test_stop_while_a_worker_is_lost() -> None:
    machine = Machine(Phase.READY, SPARE)
    lose(machine)
    assert machine.take(StopRequested()) == [SendMessage("cpu0", Shutdown())]
    assert machine.take(RestartRequested("gpu0")) == []
    assert machine.take(Exited("cpu0", 0)) == [Finished(None)]


def test_stop_while_a_worker_starts_again() -> None:
    machine = Machine(Phase.READY, SPARE)
    lose(machine)
    machine.take(RestartRequested("gpu0"))
    assert machine.take(StopRequested()) == [SendMessage("cpu0", Shutdown()), Terminate("gpu0")]
    assert machine.take(Exited("cpu0", 0)) == []
    assert machine.take(Exited("gpu0", -15)) == [Finished(None)]


def test_stop_while_a_failed_worker_has_not_gone_yet() -> None:
    machine = Machine(Phase.READY, SPARE)
    machine.hear("gpu0", Failure("ResourceError", "out of memory"))
    assert machine.take(StopRequested()) == [SendMessage("cpu0", Shutdown()), Terminate("gpu0")]
    assert machine.take(Exited("gpu0", -9)) == []
    assert machine.take(Exited("cpu0", 0)) == [Finished(None)]
    assert machine.phase() is Phase.STOPPED


def test_another_worker_dies_while_one_is_lost() -> None:
    machine = Machine(Phase.READY, SPARE)
    lose(machine)
    machine.take(RestartRequested("gpu0"))
    abort, terminate = machine.take(Exited("cpu0", -9))
    assert isinstance(abort, Abort)
    assert terminate == Terminate("gpu0")
    assert machine.take(Exited("gpu0", -15)) == [Finished(abort.error)]
