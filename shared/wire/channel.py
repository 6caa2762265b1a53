"""How messages travel: ZeroMQ over an abstract Unix socket, one ROUTER for all workers, a DEALER in each.

An abstract socket has no file: nothing is left behind after SIGKILL. Its name is random, the kernel lets only this
user's processes connect, and a peer is ignored until its `Hello` (or the `Failure` of one that could not say even that)
carries the coordinator's token. Address and token reach a worker through its environment, which only the same user can
read; a command line is public.

Only control messages travel here; activations go over the board. A channel is a socket, and a ZeroMQ socket belongs
to **one thread**: open, use and close a channel in the same one. Each has a context of its own, closed with it.
"""

import hmac
import math
import os
import secrets
from collections.abc import Collection
from types import TracebackType
from typing import NamedTuple, Self

import zmq

from warmfront.shared.errors import ProtocolError, UsageError, WorkerError
from warmfront.shared.wire.messages import Failure, Hello, Message, Shutdown, decode, encode

__all__ = ["PARENT_VARIABLE", "CoordinatorChannel", "Polled", "WorkerChannel"]

ADDRESS_VARIABLE = "WARMFRONT_ADDRESS"
TOKEN_VARIABLE = "WARMFRONT_TOKEN"
PARENT_VARIABLE = "WARMFRONT_PARENT"

_MAX_MESSAGE_BYTES = 64 << 20
# Messages taken in one poll: a flood of them must not keep the coordinator from watching its processes.
_MAX_BATCH = 1000


class _Channel:
    def __init__(self, kind: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)

    def close(self) -> None:
        """Close the socket and its context; may be called twice."""
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WorkerChannel(_Channel):
    """A worker's end of the channel. `token` goes into its `Hello`."""

    def __init__(self, address: str, token: str, parent_pid: int) -> None:
        super().__init__(zmq.DEALER)
        self.token = token
        try:
            self._parent = os.pidfd_open(parent_pid)
        except OSError as error:
            super().close()
            raise WorkerError(f"the coordinator, process {parent_pid}, is gone") from error
        self._socket.connect(address)

    @classmethod
    def from_environment(cls) -> Self:
        """Connect to the coordinator that started this process. Raises UsageError if it was started by hand."""
        try:
            return cls(os.environ[ADDRESS_VARIABLE], os.environ[TOKEN_VARIABLE], int(os.environ[PARENT_VARIABLE]))
        except (KeyError, ValueError) as error:
            raise UsageError("a worker is started by the coordinator: run `warmfront` instead") from error

    def send(self, message: Message) -> None:
        """Send; waits while the coordinator is stopped or behind. A message to a dead one is dropped."""
        if not self._wait(zmq.POLLOUT, None):
            self._socket.send(encode(message))

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, `Shutdown` once the coordinator has died, None after `timeout_s` seconds."""
        if self._wait(zmq.POLLIN, timeout_s):
            return Shutdown()
        if not self._socket.poll(0):
            return None
        return decode(b"".join(self._socket.recv_multipart()))

    def close(self) -> None:
        """Close, giving the last message a second to get out if the coordinator lives."""
        if not self._socket.closed:
            self._socket.linger = 0 if self._wait(0, 0.0) else 1000
            os.close(self._parent)
        super().close()

    def _wait(self, events: int, timeout_s: float | None) -> bool:
        """Wait for `events` of the socket or the coordinator's death; returns whether it has died."""
        poller = zmq.Poller()
        poller.register(self._parent, zmq.POLLIN)
        if events:
            poller.register(self._socket, events)
        return any(ready == self._parent for ready, _ in poller.poll(_milliseconds(timeout_s)))


def _milliseconds(timeout_s: float | None) -> int | None:
    """For a poller, to which a negative number means "for ever"."""
    return None if timeout_s is None else max(0, math.ceil(timeout_s * 1000))


class Polled(NamedTuple):
    """What a poll found."""

    messages: list[tuple[str, Message]]  # (worker, message), in order
    readable: list[int]  # of the extra descriptors


class CoordinatorChannel(_Channel):
    """The coordinator's end, reachable by the workers started with `environment()`."""

    def __init__(self) -> None:
        super().__init__(zmq.ROUTER)
        self.address = f"ipc://@warmfront-{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(16).hex()
        self._names: dict[bytes, str] = {}
        self._routes: dict[str, bytes] = {}
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        self._socket.bind(self.address)

    def environment(self) -> dict[str, str]:
        """The variables that a worker's environment needs to find this channel."""
        return {
            ADDRESS_VARIABLE: self.address,
            TOKEN_VARIABLE: self.token,
            PARENT_VARIABLE: str(os.getpid()),
        }

    def send(self, worker: str, message: Message) -> None:
        """Send to the process that last said `Hello` as `worker` (KeyError if none did); dropped if that has ended."""
        self._socket.send_multipart([self._routes[worker], encode(message)])

    def forget(self, worker: str) -> None:
        """Ignore what the last process called `worker` may still send: another takes its place."""
        if worker in self._routes:
            del self._names[self._routes.pop(worker)]

    def poll(self, timeout_s: float, extra_fds: Collection[int] = ()) -> Polled:
        """Wait up to `timeout_s` seconds for messages or for one of `extra_fds` (sentinels, pidfds) to be readable."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        for fd in extra_fds:
            poller.register(fd, zmq.POLLIN)
        readable = [ready for ready, _ in poller.poll(_milliseconds(timeout_s)) if isinstance(ready, int)]
        messages: list[tuple[str, Message]] = []
        for _ in range(_MAX_BATCH):
            try:
                route, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages += self._admit(route, b"".join(parts))
        return Polled(messages, readable)

    def _admit(self, route: bytes, data: bytes) -> list[tuple[str, Message]]:
        """The message with its sender's name; nothing if the sender has not shown the token."""
        name = self._names.get(route)
        try:
            message = decode(data)
        except ProtocolError as error:
            return [] if name is None else [(name, Failure.of(error))]
        if name is None:
            if not isinstance(message, Hello | Failure) or not self._knows(message.token):
                return []
            name = self._names[route] = message.name
            self._routes[name] = route
        return [(name, message)]

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(errors="surrogateescape"), self.token.encode())
