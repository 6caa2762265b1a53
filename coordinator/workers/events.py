"""What goes into the state machine of the workers (`lifecycle.py`) and what comes out: plain data, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass

from warmfront.shared.errors import WarmfrontError
from warmfront.shared.wire.messages import Assignment, Hello, LoadReport, Message, Moved, Ready

# Events: what happened.


@dataclass(frozen=True, slots=True)
class Received:
    """A worker sent a message."""

    worker: str
    message: Message


@dataclass(frozen=True, slots=True)
class Assigned:
    """The assignments asked for by `MakeAssignments`, one per worker."""

    assignments: Mapping[str, Assignment]


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker's process ended."""

    worker: str
    returncode: int  # minus the signal that killed it


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The engine is to stop."""


@dataclass(frozen=True, slots=True)
class RestartRequested:
    """The engine runs without `worker`, which was lost: another process may take its place."""

    worker: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Received | Assigned | Exited | StopRequested | RestartRequested | Tick


# Instructions: what to do.


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Send `message` to `worker`, which has said Hello."""

    worker: str
    message: Message


@dataclass(frozen=True, slots=True)
class MakeAssignments:
    """Place the neurons on the workers, now that their memory is known; answer with `Assigned`."""

    hellos: Mapping[str, Hello]


@dataclass(frozen=True, slots=True)
class ReportProgress:
    """How far all workers together have loaded."""

    done: int  # bytes
    total: int  # without the workers that have not begun


@dataclass(frozen=True, slots=True)
class AnnounceReady:
    """Every worker serves the board."""

    readies: Mapping[str, Ready]


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """`worker`, one that may be lost, has ended: its process can write nothing any more."""

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
    """No worker is left."""

    error: WarmfrontError | None  # why; None after a requested stop


Instruction = (
    SendMessage
    | MakeAssignments
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
