"""What goes into the lifecycle of the workers, and what comes out: plain data, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass

from warmfront.shared.errors import WarmfrontError
from warmfront.shared.wire.messages import Hello, LoadReport, Message, Moved, Plan, Ready

# Events: what happened.


@dataclass(frozen=True, slots=True)
class Received:
    """A worker sent a message."""

    worker: str
    message: Message


@dataclass(frozen=True, slots=True)
class Planned:
    """The plans asked for by `MakePlans`, one per worker."""

    plans: Mapping[str, Plan]


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker's process ended; `returncode` is minus the signal that killed it."""

    worker: str
    returncode: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The user or the engine wants to stop."""


@dataclass(frozen=True, slots=True)
class RestartRequested:
    """The engine gets along without `worker`, which was lost: another may take its place."""

    worker: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Received | Planned | Exited | StopRequested | RestartRequested | Tick


# Instructions: what to do.


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Send `message` to `worker`, which has said Hello."""

    worker: str
    message: Message


@dataclass(frozen=True, slots=True)
class MakePlans:
    """Place the neurons on the workers, now that their memory is known; answer with `Planned`."""

    hellos: Mapping[str, Hello]


@dataclass(frozen=True, slots=True)
class ReportProgress:
    """Bytes loaded by all workers, of how many; those that have not begun are not in the total yet."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class AnnounceReady:
    """Every worker serves the board; what each said then."""

    readies: Mapping[str, Ready]


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """`worker`, which the run can do without, will answer no more; its process is gone or will be killed."""

    worker: str
    error: WarmfrontError


@dataclass(frozen=True, slots=True)
class Start:
    """Start the process of `worker` again."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerRejoined:
    """`worker` serves the board again, with empty slots."""

    worker: str
    ready: Ready


@dataclass(frozen=True, slots=True)
class DeliverMoved:
    """A worker has copied the groups of a batch."""

    worker: str
    moved: Moved


@dataclass(frozen=True, slots=True)
class DeliverReport:
    """A worker's answer to a ReportRequest."""

    worker: str
    report: LoadReport


@dataclass(frozen=True, slots=True)
class Abort:
    """Set the board's abort word, so that nobody waits for an answer; raise `error` to the caller."""

    error: WarmfrontError


@dataclass(frozen=True, slots=True)
class Terminate:
    """Send SIGTERM to `worker`."""

    worker: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Send SIGKILL to `worker`."""

    worker: str


@dataclass(frozen=True, slots=True)
class Finished:
    """No worker is left; `error` is why, None after a requested stop."""

    error: WarmfrontError | None


Instruction = (
    SendMessage
    | MakePlans
    | ReportProgress
    | AnnounceReady
    | DeliverReport
    | DeliverMoved
    | WorkerLost
    | Start
    | WorkerRejoined
    | Abort
    | Terminate
    | Kill
    | Finished
)
