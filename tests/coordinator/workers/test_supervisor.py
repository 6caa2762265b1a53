"""The supervisor with real processes that misbehave.  pytest tests/coordinator/workers/test_supervisor.py

Workers that do as they should are met in tests/integration.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from warmfront.coordinator.workers.events import DeliverMoved, WorkerLost, WorkerRejoined
from warmfront.coordinator.workers.supervisor import News, Supervisor
from warmfront.shared.errors import ModelError, ProtocolError, WorkerError
from warmfront.shared.machine.memory import create_shared
from warmfront.shared.wire.messages import Assignment, Hello, Move, Moved, Ready

HELLO = """
import os, sys, time
from warmfront.shared.wire.channel import WorkerChannel
from warmfront.shared.wire.messages import *
channel = WorkerChannel.from_environment()
channel.send(Hello(channel.token, sys.argv[1], os.getpid(), "cpu", 1, PROTOCOL))
"""
# After its assignment it serves until told to stop.
GOOD = f"""{HELLO}
assignment = channel.receive(20)
channel.send(Progress(assignment.index, 7))
channel.send(Ready(3, {{}}))
while not isinstance(message := channel.receive(1), Shutdown):
    if isinstance(message, ReportRequest):
        channel.send(LoadReport(assignment.index, [1], [2], [3], []))
    else:
        channel.send(Moved(message.batch, len(message.places)) if isinstance(message, Move) else Heartbeat())
channel.close()
"""


class Bench:
    """Starts supervisors of workers whose code is given, and notes what they ask for."""

    def __init__(self, folder: Path, fd: int) -> None:
        self._folder, self._fd = folder, fd
        self.aborts = 0
        self.lost: list[str] = []
        self.refusal: ModelError | None = None
        self.supervisors: list[Supervisor] = []

    def start(self, optional: Sequence[str] = (), **codes: str) -> Supervisor:
        for name, code in codes.items():
            self.rewrite(name, code)
        modules = {name: f"worker_{name}" for name in codes}
        environment = {"PYTHONPATH": str(self._folder), "FOLDER": str(self._folder)}
        supervisor = Supervisor(
            modules,
            self._fd,
            assign=self._assign,
            on_lost=self.lost.append,
            on_abort=self._abort,
            environment=environment,
            optional=optional,
        )
        self.supervisors.append(supervisor)
        return supervisor

    def _assign(self, hellos: Mapping[str, Hello]) -> Mapping[str, Assignment]:
        if self.refusal is not None:
            raise self.refusal
        return {name: Assignment(int(name[-1]), "model", "", [0], "all", b"", 0, 1.0, 0) for name in hellos}

    def _abort(self) -> None:
        self.aborts += 1

    def rewrite(self, name: str, code: str) -> None:
        """What a worker that is started from now on runs."""
        (self._folder / f"worker_{name}.py").write_text(code)

    def exists(self, name: str) -> None:
        """Wait until a worker has made a file of that name."""
        wait_for((self._folder / name).exists)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    fd = create_shared("warmfront-test", 4096)
    bench = Bench(tmp_path, fd)
    yield bench
    for supervisor in bench.supervisors:
        supervisor.stop()
    os.close(fd)


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def error_of(supervisor: Supervisor, kind: type[Exception]) -> str:
    """The message of the error that ends the wait for readiness."""
    with pytest.raises(kind) as caught:
        wait_for(supervisor.ready)
    return str(caught.value)


def test_workers_that_do_as_they_should(bench: Bench) -> None:
    supervisor = bench.start(cpu0=GOOD, cpu1=GOOD)
    wait_for(supervisor.ready)
    assert list(supervisor.hellos) == ["cpu0", "cpu1"]
    assert supervisor.loaded[1] == 14
    for _ in range(2):
        assert {name: report.jobs for name, report in supervisor.reports().items()} == {"cpu0": 0, "cpu1": 1}
    started = time.monotonic()
    supervisor.stop()
    supervisor.stop()
    assert time.monotonic() - started < 5
    supervisor.check()
    assert bench.aborts == 0


def test_a_worker_that_exits_at_once(bench: Bench) -> None:
    supervisor = bench.start(cpu0="raise SystemExit(3)", cpu1=GOOD)
    expected = "worker cpu0 exited with code 3 while starting: see its output above"
    assert error_of(supervisor, WorkerError) == expected
    assert bench.aborts >= 1
    # And again, whoever asks.
    with pytest.raises(WorkerError, match=re.escape(expected)):
        supervisor.wait_for_error()


def test_a_module_that_is_not_there(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    missing = Supervisor(
        {"cpu0": "no_such_module"}, 0, assign=lambda hellos: {}, on_lost=print, on_abort=lambda: None, environment={}
    )
    bench.supervisors.append(missing)
    assert "worker cpu0 exited with code 1 while starting" in error_of(missing, WorkerError)
    assert "no_such_module" in capfd.readouterr().err


@pytest.mark.parametrize("phase", ["before its assignment", "when ready"])
def test_a_worker_that_is_killed(bench: Bench, phase: str) -> None:
    supervisor = bench.start(cpu0=GOOD if phase == "when ready" else HELLO + "time.sleep(60)", cpu1=GOOD)
    wait_for(supervisor.ready if phase == "when ready" else lambda: len(supervisor.hellos) == 2)
    os.kill(supervisor.hellos["cpu0"].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"^worker cpu0 was killed by signal 9 while .*may be out of memory"):
        wait_for(lambda: supervisor.check() is not None)


def test_last_words_say_more_than_an_exit_code(bench: Bench) -> None:
    words = "channel.send(Failure('ModelError', 'the file is gone'))\nchannel.close()\nraise SystemExit(1)"
    supervisor = bench.start(cpu0=f"{HELLO}\n{words}")
    assert error_of(supervisor, ModelError) == "worker cpu0: the file is gone"


def test_a_worker_that_talks_nonsense(bench: Bench) -> None:
    supervisor = bench.start(
        cpu0=f"{HELLO}\nchannel.send(Ready(0, {{}}))\ntime.sleep(60)", cpu1="import time; time.sleep(60)"
    )
    assert error_of(supervisor, ProtocolError) == "worker cpu0 sent Ready while starting: not expected there"


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("ready", [False, True])
def test_a_worker_that_does_not_leave_is_made_to(bench: Bench, ready: bool, deaf: bool) -> None:
    """A worker that is not ready is terminated at once, a ready one after a second; one that ignores that is killed."""
    code = (
        f"import os, signal, time\n{DEAF if deaf else ''}\n{HELLO}\nchannel.receive(20)\n"
        f"{'channel.send(Ready(3, {}))' if ready else ''}\n"
        "new = os.environ['FOLDER'] + '/new'\n"
        "with open(new, 'w') as file: file.write(str(os.getpid()))\n"
        "os.rename(new, os.environ['FOLDER'] + '/started')\ntime.sleep(60)"  # there as a whole or not at all
    )
    supervisor = bench.start(cpu0=code)
    bench.exists("started")
    if ready:
        wait_for(supervisor.ready)
    started = time.monotonic()
    supervisor.stop()
    took = time.monotonic() - started
    least, most = (1.5, 4) if deaf else (1.0, 3) if ready else (0.0, 0.9)
    assert least <= took < most
    supervisor.check()
    assert not (Path("/proc") / (bench._folder / "started").read_text()).exists()
    assert bench.aborts == 0


def test_plans_that_cannot_be_made_end_everything(bench: Bench) -> None:
    bench.refusal = ModelError("it does not fit")
    assert error_of(bench.start(cpu0=GOOD), ModelError) == "it does not fit"


def test_reports_after_the_end(bench: Bench) -> None:
    supervisor = bench.start(cpu0=GOOD)
    wait_for(supervisor.ready)
    supervisor.stop()
    with pytest.raises(WorkerError, match=r"^the workers were stopped: load the model again$"):
        supervisor.reports()


def test_reports_after_an_error(bench: Bench) -> None:
    supervisor = bench.start(cpu0="raise SystemExit(3)")
    error_of(supervisor, WorkerError)
    with pytest.raises(WorkerError, match="exited with code 3"):
        supervisor.reports()


def next_news(supervisor: Supervisor, count: int = 1, timeout_s: float = 20) -> list[News]:
    """The next `count` things that happen."""
    deadline, news = time.monotonic() + timeout_s, list[News]()
    while len(news) < count:
        assert time.monotonic() < deadline, news
        news += supervisor.news(0.1)
    return news


def kill(supervisor: Supervisor, name: str) -> None:
    os.kill(supervisor.hellos[name].pid, signal.SIGKILL)


def test_moves_are_delivered_in_order(bench: Bench) -> None:
    supervisor = bench.start(cpu0=GOOD, cpu1=GOOD)
    wait_for(supervisor.ready)
    assert supervisor.readies == {"cpu0": Ready(3, {}), "cpu1": Ready(3, {})}
    for batch in range(20):
        supervisor.move(f"cpu{batch % 2}", Move(batch, bytes(12 * batch)))
    news = next_news(supervisor, 20)
    for name in ("cpu0", "cpu1"):
        expected = [DeliverMoved(name, Moved(batch, 12 * batch)) for batch in range(int(name[-1]), 20, 2)]
        assert [each for each in news if each.worker == name] == expected
    started = time.monotonic()
    assert supervisor.news() == []
    assert supervisor.news(0.3) == []
    assert time.monotonic() - started >= 0.3


def test_an_optional_worker_that_is_killed_is_started_again_when_asked_for(bench: Bench) -> None:
    supervisor = bench.start(["gpu1"], cpu0=GOOD, gpu1=GOOD)
    wait_for(supervisor.ready)
    for turn in range(2):
        first = supervisor.hellos["gpu1"].pid
        kill(supervisor, "gpu1")
        (lost,) = next_news(supervisor)
        assert isinstance(lost, WorkerLost)
        assert str(lost.error).startswith("worker gpu1 was killed by signal 9 while generating")
        assert bench.lost == ["gpu1"] * (turn + 1)
        supervisor.move("gpu1", Move(1, b""))  # to nobody
        assert supervisor.reports().keys() == {"cpu0"}
        assert supervisor.news(0.2) == []
        supervisor.restart("gpu1")
        assert next_news(supervisor) == [WorkerRejoined("gpu1", Ready(3, {}))]
        assert supervisor.hellos["gpu1"].pid != first
        assert supervisor.reports().keys() == {"cpu0", "gpu1"}
        supervisor.move("gpu1", Move(2, b"123"))
        assert next_news(supervisor) == [DeliverMoved("gpu1", Moved(2, 3))]
    supervisor.check()
    assert bench.aborts == 0


def test_a_restarted_worker_without_a_plan_is_lost_again(bench: Bench) -> None:
    """For example, a GPU whose memory another process has taken meanwhile."""
    supervisor = bench.start(["gpu1"], cpu0=GOOD, gpu1=GOOD)
    wait_for(supervisor.ready)
    kill(supervisor, "gpu1")
    next_news(supervisor)
    bench.refusal = ModelError("it does not fit")
    supervisor.restart("gpu1")
    (lost,) = next_news(supervisor)
    assert isinstance(lost, WorkerLost)
    assert str(lost.error) == "worker gpu1: it does not fit"
    bench.refusal = None
    supervisor.restart("gpu1")
    assert next_news(supervisor) == [WorkerRejoined("gpu1", Ready(3, {}))]
    supervisor.check()


def test_a_worker_that_does_not_come_back_is_given_up(bench: Bench) -> None:
    supervisor = bench.start(["gpu1"], cpu0=GOOD, gpu1=GOOD)
    wait_for(supervisor.ready)
    bench.rewrite("gpu1", "raise SystemExit(3)")
    kill(supervisor, "gpu1")
    for _ in range(3):
        next_news(supervisor)
        supervisor.restart("gpu1")
    (lost,) = next_news(supervisor)
    assert isinstance(lost, WorkerLost)
    assert str(lost.error).startswith("worker gpu1 exited with code 3")
    supervisor.restart("gpu1")
    assert supervisor.news(0.5) == []
    assert supervisor.reports().keys() == {"cpu0"}


def test_a_worker_dies_before_it_reports(bench: Bench) -> None:
    """The others' reports are complete without it."""
    dumb = GOOD.replace("isinstance(message, ReportRequest)", "False").replace(
        "channel.send(Moved", "None if isinstance(message, ReportRequest) else channel.send(Moved"
    )
    supervisor = bench.start(["gpu1"], cpu0=GOOD, gpu1=dumb)
    wait_for(supervisor.ready)
    supervisor.request_reports()
    time.sleep(0.3)
    assert supervisor.reported() is None
    kill(supervisor, "gpu1")
    next_news(supervisor)
    wait_for(lambda: supervisor.reported() is not None)
    reported = supervisor.reported()
    assert reported is not None
    assert reported.keys() == {"cpu0"}


def test_a_lost_worker_takes_its_report_with_it(bench: Bench) -> None:
    supervisor = bench.start(["gpu1"], cpu0=GOOD, gpu1=GOOD)
    wait_for(supervisor.ready)
    assert supervisor.reports().keys() == {"cpu0", "gpu1"}
    kill(supervisor, "gpu1")
    next_news(supervisor)
    wait_for(lambda: (supervisor.reported() or {}).keys() == {"cpu0"})


def test_reports_are_those_asked_for_last(bench: Bench) -> None:
    """However many rounds were requested before and not awaited."""
    counting = GOOD.replace("while not", "count = 0\nwhile not").replace(
        "LoadReport(assignment.index,", "LoadReport((count := count + 1),"
    )
    supervisor = bench.start(cpu0=counting, cpu1=counting)
    wait_for(supervisor.ready)
    for turn in range(1, 30):
        for _ in range(4):
            supervisor.request_reports()
        assert {report.jobs for report in supervisor.reports().values()} == {5 * turn}
