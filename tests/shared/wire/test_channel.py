"""Coordinator and workers talk, strangers do not, with real processes.  pytest tests/shared/wire/test_channel.py"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from warmfront.shared.errors import ProtocolError, UsageError, WorkerError
from warmfront.shared.wire.channel import CoordinatorChannel, WorkerChannel
from warmfront.shared.wire.messages import (
    Assignment,
    Failure,
    Heartbeat,
    Hello,
    Message,
    Progress,
    Ready,
    Shutdown,
    encode,
)

WORKER = """
import os, sys
from warmfront.shared.wire.channel import WorkerChannel
from warmfront.shared.wire.messages import *
with WorkerChannel.from_environment() as channel:
    channel.send(Hello(channel.token, sys.argv[1], os.getpid(), "cpu", 1, PROTOCOL))
    plan = channel.receive(10)
    channel.send(Progress(len(plan.home), plan.index))
    while not isinstance(channel.receive(1), Shutdown):
        channel.send(Heartbeat())
    print("shut down", flush=True)
    channel.send(Failure("ModelError", "last words"))
"""
RAW = """
import os, sys, time, zmq
if len(sys.argv) > 3:
    os.setuid(int(sys.argv[3]))
with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
    socket.linger = 300
    socket.connect(sys.argv[1])
    socket.send(bytes.fromhex(sys.argv[2]))
"""


@pytest.fixture
def coordinator() -> Iterator[CoordinatorChannel]:
    with CoordinatorChannel() as channel:
        yield channel
        address = channel.address.removeprefix("ipc://")
        assert address in Path("/proc/net/unix").read_text()
    assert address not in Path("/proc/net/unix").read_text()


def hello(token: str, name: str = "cpu0") -> Hello:
    return Hello(token, name, os.getpid(), "cpu", 1, 1)


def connect(coordinator: CoordinatorChannel) -> WorkerChannel:
    """A worker's end in this process."""
    return WorkerChannel(coordinator.address, coordinator.token, os.getpid())


def start(code: str, coordinator: CoordinatorChannel, *args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **coordinator.environment()}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=environment, stdout=subprocess.PIPE, text=True)


def next_messages(coordinator: CoordinatorChannel, count: int) -> list[tuple[str, Message]]:
    """Exactly the next `count` messages."""
    found: list[tuple[str, Message]] = []
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        found += coordinator.poll(0.1).messages
    assert len(found) == count
    return found


def test_two_workers_in_processes_of_their_own(coordinator: CoordinatorChannel) -> None:
    with start(WORKER, coordinator, "cpu0") as first, start(WORKER, coordinator, "cpu1") as second:
        hellos = dict(next_messages(coordinator, 2))
        assert {name: message.pid for name, message in hellos.items() if isinstance(message, Hello)} == {
            "cpu0": first.pid,
            "cpu1": second.pid,
        }
        for index, name in enumerate(("cpu0", "cpu1")):
            coordinator.send(name, Assignment(index, "m", "", [0], "all", bytes(1 << 20), 0, 1.0, 0))
        progress = [(name, m) for name, m in next_messages(coordinator, 2) if isinstance(m, Progress)]
        assert sorted(progress, key=lambda each: each[0]) == [
            ("cpu0", Progress(1 << 20, 0)),
            ("cpu1", Progress(1 << 20, 1)),
        ]
        for name in hellos:
            coordinator.send(name, Shutdown())
        last = [m for _, m in next_messages(coordinator, 2)]
        assert last == [Failure("ModelError", "last words")] * 2
        assert first.wait(10) == second.wait(10) == 0
        coordinator.send("cpu0", Shutdown())  # to a process that has gone: dropped


def test_worker_learns_of_its_parents_death() -> None:
    parent_code = f"""
import os, subprocess, sys
from warmfront.shared.wire.channel import CoordinatorChannel
from warmfront.shared.wire.messages import *
with CoordinatorChannel() as channel:
    worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}, "cpu0"], env={{**os.environ, **channel.environment()}})
    while not channel.poll(1).messages:
        pass
    channel.send("cpu0", Assignment(0, "m", "", [], "all", b"", 0, 1.0, 0))
    while not channel.poll(1).messages:
        pass
    os.kill(os.getpid(), 9)
"""
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        began = time.monotonic()
        assert parent.stdout.read() == "shut down\n"  # at the end of the pipe the worker has gone, too
        assert parent.wait() == -signal.SIGKILL
        assert time.monotonic() - began < 8


def test_what_a_forgotten_process_sends_is_a_strangers(coordinator: CoordinatorChannel) -> None:
    coordinator.forget("cpu0")
    with connect(coordinator) as old, connect(coordinator) as new:
        old.send(hello(coordinator.token))
        next_messages(coordinator, 1)
        old.send(Progress(1, 2))
        time.sleep(0.2)
        coordinator.forget("cpu0")
        old.send(Progress(3, 4))
        assert coordinator.poll(0.3).messages == []
        new.send(hello(coordinator.token))
        new.send(Progress(5, 6))
        assert next_messages(coordinator, 2) == [("cpu0", hello(coordinator.token)), ("cpu0", Progress(5, 6))]
        old.send(Progress(7, 8))
        coordinator.send("cpu0", Shutdown())
        assert new.receive(5) == Shutdown()
        assert old.receive(0.2) is None
        assert coordinator.poll(0.2).messages == []


def strangers(token: str) -> dict[str, bytes]:
    return {
        "no hello": encode(Ready(0, {})),
        "wrong token": encode(hello("0" * 32)),
        "no token": encode(hello("")),
        "token that is not UTF-8": encode(hello("\udcff")),
        "nothing": b"",
        "noise": b"\xc1\xff" * 20,
        "nested": b"\x91" * 1000,
        "token alone": token.encode(),
    }


@pytest.mark.parametrize("kind", strangers(""))
def test_stranger_is_ignored(coordinator: CoordinatorChannel, kind: str) -> None:
    data = strangers(coordinator.token)[kind]
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger, connect(coordinator) as worker:
        stranger.linger = 0
        stranger.connect(coordinator.address)
        stranger.send(data)
        stranger.send_multipart([data, data])
        stranger.send(encode(Heartbeat()))
        assert coordinator.poll(0.2).messages == []
        worker.send(hello(coordinator.token))
        assert next_messages(coordinator, 1) == [("cpu0", hello(coordinator.token))]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_another_user_cannot_connect_even_with_the_token(coordinator: CoordinatorChannel) -> None:
    data = encode(hello(coordinator.token)).hex()
    with start(RAW, coordinator, coordinator.address, data, "65534") as stranger:
        assert stranger.wait(10) == 0
    assert coordinator.poll(0.2).messages == []
    with start(RAW, coordinator, coordinator.address, data) as same_user:
        assert same_user.wait(10) == 0
    assert next_messages(coordinator, 1) == [("cpu0", hello(coordinator.token))]


def test_last_words_leave_before_the_channel_closes(coordinator: CoordinatorChannel) -> None:
    last_words = Failure("ModelError", "x" * (8 << 20))
    with connect(coordinator) as worker:
        worker.send(hello(coordinator.token))
        worker.send(last_words)
    assert next_messages(coordinator, 2)[1] == ("cpu0", last_words)


def test_closing_twice_does_no_harm() -> None:
    with CoordinatorChannel() as coordinator, connect(coordinator) as worker:
        worker.close()
        coordinator.close()


def test_nonsense_from_a_worker_is_its_failure(coordinator: CoordinatorChannel) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as worker:
        worker.linger = 0
        worker.connect(coordinator.address)
        worker.send(encode(hello(coordinator.token)))
        worker.send(b"\xc1")
        [_, (name, failure)] = next_messages(coordinator, 2)
    assert name == "cpu0"
    assert isinstance(failure, Failure)
    assert isinstance(failure.error("cpu0"), ProtocolError)


def test_worker_that_starts_again_takes_over_its_name(coordinator: CoordinatorChannel) -> None:
    with connect(coordinator) as old:
        old.send(hello(coordinator.token))
        next_messages(coordinator, 1)
    with connect(coordinator) as new:
        new.send(hello(coordinator.token))
        next_messages(coordinator, 1)
        coordinator.send("cpu0", Shutdown())
        assert new.receive(5) == Shutdown()


def test_sending_to_a_worker_never_met_is_a_mistake(coordinator: CoordinatorChannel) -> None:
    with pytest.raises(KeyError):
        coordinator.send("cpu9", Shutdown())


def test_poll_wakes_for_extra_descriptors(coordinator: CoordinatorChannel) -> None:
    with start("input()", coordinator) as child:
        sentinel = os.pidfd_open(child.pid)
        try:
            assert coordinator.poll(0.0, [sentinel]) == ([], [])
            child.kill()
            began = time.monotonic()
            assert coordinator.poll(10, [sentinel]) == ([], [sentinel])
            assert time.monotonic() - began < 5
        finally:
            os.close(sentinel)


@pytest.mark.parametrize("timeout_s", [0.0, 0.05, -1.0])
def test_receive_and_poll_return_after_their_time(coordinator: CoordinatorChannel, timeout_s: float) -> None:
    with connect(coordinator) as worker:
        waits: list[tuple[Callable[[float], object], object]] = [(coordinator.poll, ([], [])), (worker.receive, None)]
        for wait, nothing in waits:
            began = time.monotonic()
            assert wait(timeout_s) == nothing
            assert 0.9 * max(0, timeout_s) <= time.monotonic() - began < 2  # polled in milliseconds


def test_malformed_message_to_a_worker(coordinator: CoordinatorChannel) -> None:
    with connect(coordinator) as worker:
        worker.send(hello(coordinator.token))
        next_messages(coordinator, 1)
        coordinator._socket.send_multipart([coordinator._routes["cpu0"], b"noise"])
        with pytest.raises(ProtocolError):
            worker.receive(5)


def test_oversized_message_is_never_taken_in(coordinator: CoordinatorChannel) -> None:
    with connect(coordinator) as worker:
        worker.send(hello(coordinator.token))
        next_messages(coordinator, 1)
        worker.send(Failure("ModelError", "x" * (64 << 20)))
        assert coordinator.poll(0.5).messages == []


def test_parent_already_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    with pytest.raises(WorkerError, match="is gone"):
        WorkerChannel("ipc://@warmfront-nobody", "", gone.pid)


def test_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WARMFRONT_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="run `warmfront` instead"):
        WorkerChannel.from_environment()


def test_addresses_and_tokens_differ() -> None:
    with CoordinatorChannel() as first, CoordinatorChannel() as second:
        assert first.address != second.address
        assert first.token != second.token
        assert len(first.token) == 32
