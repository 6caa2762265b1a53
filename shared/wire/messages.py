"""What the processes tell each other outside the hot path: small typed messages, as msgpack.

    worker                    coordinator
      Hello          ->                      once, before anything else
                     <-       Plan           what to load and where to run
      Progress       ->                      while loading
      Ready          ->                      the worker serves the board from now on
                     <-       ReportRequest  every few tokens
      LoadReport     ->
                     <-       Move           groups to copy into slots
      Moved          ->
      Heartbeat      ->                      every second, from Hello on
      Failure        ->                      the worker's last words
                     <-       Shutdown

On the wire a message is the array [class name, field, field, ...] in the order of the fields. A decoder accepts only
exactly that: the known names, the right number of fields, each of exactly its type. Nothing is ever unpickled.
"""

from dataclasses import dataclass, fields
from typing import Any, Self, cast, get_type_hints

import msgpack

from warmfront.shared import errors
from warmfront.shared.errors import ProtocolError, WarmfrontError, WorkerError

__all__ = [
    "PROTOCOL",
    "Failure",
    "Heartbeat",
    "Hello",
    "LoadReport",
    "Message",
    "Move",
    "Moved",
    "Plan",
    "Progress",
    "Ready",
    "ReportRequest",
    "Shutdown",
    "decode",
    "encode",
]

# Raise it with any change of a message or of the board. `Hello` itself never changes, so that both sides can tell.
PROTOCOL = 4


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker has started. `token` proves that the coordinator started it; `free_bytes` of its device."""

    token: str
    name: str
    pid: int
    device: str
    free_bytes: int
    protocol: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker is to do.

    `index`: its number on the board; `model`: path of the packed file, `order`: of its neurons; `cpus`: one per thread.
    A CPU worker reads the groups that `home`, uint8 [layers * groups], gives it, and has `spare` slots more; `slow`:
    how many times slower than it is it is to seem. A GPU worker reads nothing yet and makes as many slots as `budget`
    bytes of device memory hold. `memory`: the NUMA node whose memory to take, -1 = any; `pinned`: whether threads stay
    on their cpus; `spins`: rounds of spinning at a barrier.
    """

    index: int
    model: str
    order: str
    cpus: list[int]
    selector: str
    home: bytes
    spare: int
    slow: float
    budget: int
    memory: int = -1
    pinned: bool = True
    spins: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes loaded so far, of how many."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker serves the board, holds this many bytes of weights and has this many slots.

    `ledger`: bytes of device memory by purpose, of a GPU worker; of memory by NUMA node ("node0"), as the kernel says,
    of a CPU worker.
    """

    bytes_resident: int
    slots: int
    ledger: dict[str, int]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A worker's work since it became ready: jobs in all; time, neurons and bytes read per layer.

    A job's time is that from its announcement: what the worker waits for its core or device counts.

    `measured`: of the jobs whose selection was compared with the truth: their number, the neurons selected, those of
    all owned that fired, and those that were selected and fired.
    """

    jobs: int
    busy_ns: list[int]
    neurons: list[int]
    bytes: list[int]
    measured: list[int]


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """Asks for a `LoadReport`."""


@dataclass(frozen=True, slots=True)
class Move:
    """Copy groups into slots that nobody computes with; `places`: int32 [n, 3] of layer, group, slot."""

    batch: int
    places: bytes


@dataclass(frozen=True, slots=True)
class Moved:
    """The groups of a `Move` lie in their slots; it took this many ns of work: waiting for a core is none."""

    batch: int
    ns: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The worker's main thread is alive."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The worker's last words. `kind` names a class of `errors.py`; `token` and `name` as in `Hello`, if before it."""

    kind: str
    message: str
    token: str = ""
    name: str = ""

    @classmethod
    def of(cls, error: Exception, token: str = "", name: str = "") -> Self:
        """What to send about `error`; what was not raised on purpose becomes a WorkerError that names its class."""
        if isinstance(error, WarmfrontError):
            return cls(type(error).__name__, str(error), token, name)
        return cls(WorkerError.__name__, f"{type(error).__name__}: {error}", token, name)

    def error(self, worker: str) -> WarmfrontError:
        """The error to raise in the coordinator, of the class that `worker` raised."""
        kind = getattr(errors, self.kind) if self.kind in errors.__all__ else WorkerError
        return cast(WarmfrontError, kind(f"worker {worker}: {self.message}"))


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave in order, now."""


Message = Hello | Plan | Progress | Ready | LoadReport | ReportRequest | Move | Moved | Heartbeat | Failure | Shutdown

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (Hello, Plan, Progress, Ready, LoadReport, ReportRequest, Move, Moved, Heartbeat, Failure, Shutdown)
}
_TYPES: dict[str, tuple[Any, ...]] = {name: tuple(get_type_hints(kind).values()) for name, kind in _KINDS.items()}


def encode(message: Message) -> bytes:
    """The message as msgpack. Paths that are not UTF-8 survive."""
    values = [getattr(message, field.name) for field in fields(message)]
    return cast(bytes, msgpack.packb([type(message).__name__, *values], unicode_errors="surrogateescape"))


def decode(data: bytes) -> Message:
    """The message that `data` encodes. Raises ProtocolError if it does not encode one exactly."""
    try:
        parts = msgpack.unpackb(data, unicode_errors="surrogateescape")
        name, values = parts[0], parts[1:]
        types = _TYPES[name]
    except (ValueError, TypeError, LookupError, msgpack.UnpackException):
        raise ProtocolError(f"{len(data)} bytes that are not a message of warmfront's protocol {PROTOCOL}") from None
    if len(values) != len(types) or not all(map(_is, values, types)):
        raise ProtocolError(f"a {name} message whose fields are not those of warmfront's protocol {PROTOCOL}")
    return _KINDS[name](*values)


def _is(value: object, kind: Any) -> bool:
    """Exact types: True is no int."""
    if kind == list[int]:
        return type(value) is list and all(type(item) is int for item in value)
    if kind == dict[str, int]:
        return type(value) is dict and all(type(name) is str and type(item) is int for name, item in value.items())
    return type(value) is kind
