"""What the processes tell each other outside the hot path: small typed messages, as msgpack.

    worker                    coordinator
      Hello          ->                      once, before anything else
                     <-       Assignment     what to load and where to run
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
exactly that: a known name, the right number of fields, each of exactly its type. Nothing is ever unpickled.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Self, cast, get_args, get_type_hints

import msgpack

from warmfront.shared import errors
from warmfront.shared.errors import ProtocolError, WarmfrontError, WorkerError

__all__ = [
    "PROTOCOL",
    "Assignment",
    "Failure",
    "Heartbeat",
    "Hello",
    "LoadReport",
    "Message",
    "Move",
    "Moved",
    "Progress",
    "Ready",
    "ReportRequest",
    "Shutdown",
    "decode",
    "encode",
]

# Raised with every change of a message or of the board. `Hello` itself never changes, so that both sides can tell.
PROTOCOL = 11


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker has started."""

    token: str  # proves that the coordinator started it
    name: str  # as on its command line: "cpu0", "gpu0"
    pid: int
    device: str  # for people, such as "cpu" or "cuda:0 NVIDIA H100"
    free_bytes: int  # of the device's memory
    protocol: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is to do. A CPU worker reads its groups at once; a GPU worker starts with empty slots."""

    index: int  # its number on the board
    model: str  # path of the packed file
    neuron_order: str  # of the packed file when the assignment was made (PackedModel.order)
    cpus: list[int]  # one per thread
    selector: str
    home: bytes  # uint8 [layers * groups]: the number of the worker that keeps each group
    spare_slots: int  # of a CPU worker: for groups that move to it, beyond its own
    slowdown: float  # emulation: how many times slower than it is the worker pretends to be
    vram_budget: int  # of a GPU worker: bytes of device memory for slots and all else
    memory_node: int = -1  # the NUMA node whose memory to take, -1 = any
    pinned: bool = True  # threads stay on their cpus
    spins: int = 0  # rounds of spinning at a barrier
    activation: str = ""  # of the feed-forward layers; "": that of the packed file
    ram_budget: int = 0  # of a CPU worker: bytes that its neurons may take, 0: all of them
    offload_policy: str = "lru"  # what goes first of those, with a budget
    offload_window: int = 0  # tokens, of the policy `window`
    offload_asynchronous: bool = True  # what is there is computed while the rest is read
    distances: bytes = b""  # of a CPU worker: how far ahead weights are fetched (`fetching.as_distances`)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a worker has loaded."""

    done: int  # bytes
    total: int
    worked: int = 0  # ns of processor time since the process started: it may be compiling


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker serves the board."""

    slots: int  # for groups, in all
    ledger: dict[str, int]  # bytes: of device memory by purpose (GPU); of memory by NUMA node, "node0" (CPU)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A worker's work on single tokens since it became ready."""

    jobs: int  # of all layers
    busy_ns: list[int]  # by layer, from a job's announcement on: waiting for the core or the device counts
    neurons: list[int]  # by layer: computed
    bytes: list[int]  # by layer: of weights, read
    # Of the jobs whose selection was compared with the truth: how many, neurons selected, owned neurons that fired,
    # neurons that were selected and fired.
    compared: list[int]
    # Of a worker with a RAM budget: what its cache counted (`cpu_worker/cache_table.py`); else empty.
    cache: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """Asks for a `LoadReport`."""


@dataclass(frozen=True, slots=True)
class Move:
    """Copy groups into slots with which nobody computes."""

    batch: int  # a number that is never used again
    places: bytes  # int32 [n, 3]: layer, group, slot


@dataclass(frozen=True, slots=True)
class Moved:
    """The groups of a `Move` are in their slots."""

    batch: int
    ns: int  # of work: waiting for a core does not count


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The worker's main thread is alive."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The worker's last words."""

    kind: str  # the name of a class of `errors.py`
    message: str
    token: str = ""  # as in `Hello`, of a worker that could not even say that
    name: str = ""

    @classmethod
    def of(cls, error: Exception, token: str = "", name: str = "") -> Self:
        """What to send about `error`; one not raised on purpose becomes a WorkerError that names its class."""
        if isinstance(error, WarmfrontError):
            return cls(type(error).__name__, str(error), token, name)
        return cls(WorkerError.__name__, f"{type(error).__name__}: {error}", token, name)

    def error(self, worker: str) -> WarmfrontError:
        """The error to raise in the coordinator, of the class that was raised in `worker`."""
        kind = getattr(errors, self.kind) if self.kind in errors.__all__ else WorkerError
        return cast(WarmfrontError, kind(f"worker {worker}: {self.message}"))


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the process now, in order."""


Message = (
    Hello | Assignment | Progress | Ready | LoadReport | ReportRequest | Move | Moved | Heartbeat | Failure | Shutdown
)

_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}
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
    """Exact types: True is not an int."""
    if kind == list[int]:
        return type(value) is list and all(type(item) is int for item in value)
    if kind == dict[str, int]:
        return type(value) is dict and all(type(name) is str and type(item) is int for name, item in value.items())
    return type(value) is kind
