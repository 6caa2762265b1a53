"""A lifecycle in made-up time, for its tests."""

from warmfront.coordinator.workers.events import (
    Abort,
    Assigned,
    Event,
    Instruction,
    Received,
    SendMessage,
    StopRequested,
    Terminate,
    Tick,
)
from warmfront.coordinator.workers.lifecycle import Lifecycle, Phase
from warmfront.shared.errors import WarmfrontError
from warmfront.shared.wire.messages import (
    PROTOCOL,
    Assignment,
    Heartbeat,
    Hello,
    LoadReport,
    Message,
    Ready,
    Shutdown,
)

NAMES = ("cpu0", "gpu0")
ASSIGNMENTS = {name: Assignment(index, "m", "", [index], "all", b"", 0, 1.0, 0) for index, name in enumerate(NAMES)}
HELLOS = {name: Hello("token", name, 100, "cpu", 1 << 30, PROTOCOL) for name in NAMES}
READY = Ready(2, {"slots": 8})
REPORT = LoadReport(1, [2], [3], [4], [])


class Machine:
    """A lifecycle with a clock that starts at an odd origin and ticks every quarter of a second."""

    def __init__(
        self, phase: Phase = Phase.STARTING, optional: tuple[str, ...] = (), required: tuple[str, ...] = ()
    ) -> None:
        self.now = 1234.5
        self.lifecycle = Lifecycle(NAMES, self.now, optional, required)
        if phase is Phase.STARTING:
            return
        for name in NAMES:
            self.hear(name, HELLOS[name])
        if phase is not Phase.ASSIGNING:
            self.take(Assigned(ASSIGNMENTS))
        if phase not in (Phase.ASSIGNING, Phase.LOADING):
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
    """The error of a failure after which both workers are asked to quit, each in the way that reaches it."""
    abort, *rest = instructions
    assert isinstance(abort, Abort)
    for each in rest:
        assert isinstance(each, Terminate) or (isinstance(each, SendMessage) and each.message == Shutdown())
    return abort.error


def both_beat() -> list[tuple[str, Message]]:
    return [(name, Heartbeat()) for name in NAMES]
