"""Messages survive the wire, and nothing else decodes.  pytest tests/shared/wire/test_messages.py"""

import os
import random
from typing import Any

import msgpack
import pytest

from warmfront.shared.errors import ModelError, ProtocolError, UsageError, WorkerError
from warmfront.shared.wire.messages import (
    Assignment,
    Failure,
    Heartbeat,
    Hello,
    LoadReport,
    Message,
    Move,
    Moved,
    Progress,
    Ready,
    ReportRequest,
    Shutdown,
    decode,
    encode,
)

MESSAGES: list[Message] = [
    Hello("00ff", "cpu0", 4711, "cpu", 1 << 40, 1),
    Assignment(2, "/models/größe.warm", "1f", [0, 2, 5], "exact", bytes(range(256)), 3, 1.5, 1 << 40, 1, False, 100),
    Progress(0, 1 << 63),
    Ready(7, {"slots": 1 << 33, "größe": 0}),
    LoadReport(3, [1, 2], [-3, 4], [], [1, 2, 3, 4]),
    ReportRequest(),
    Move(1 << 40, bytes(range(24))),
    Moved(1 << 40, 12345),
    Heartbeat(),
    Failure("ModelError", "a line"),
    Shutdown(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message


def test_exact_bytes() -> None:
    assert encode(Progress(1, 300, 7)) == b"\x94\xa8Progress\x01\xcd\x01\x2c\x07"
    assignment = Assignment(
        1, "m", "", [7], "all", b"\x00", 2, 1.5, 0, -1, True, 100, "relu", 4096, "lru", 5, True, b"\x05"
    )
    slow = b"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00"
    assert (
        encode(assignment)
        == b"\xdc\x00\x13\xaaAssignment\x01\xa1m\xa0\x91\x07\xa3all\xc4\x01\x00\x02"
        + slow
        + b"\x00\xff\xc3\x64\xa4relu\xcd\x10\x00\xa3lru\x05\xc3\xc4\x01\x05"
    )
    assert encode(Ready(6, {"a": 7})) == b"\x93\xa5Ready\x06\x81\xa1a\x07"
    assert encode(Move(3, b"\x01\x02")) == b"\x93\xa4Move\x03\xc4\x02\x01\x02"
    assert encode(Moved(3, 255)) == b"\x93\xa5Moved\x03\xcc\xff"


def test_path_that_is_not_utf8_survives() -> None:
    path = os.fsdecode(b"/models/\xff\xfe")
    received = decode(encode(Assignment(0, path, "", [], "all", b"", 0, 1.0, 0)))
    assert isinstance(received, Assignment)
    assert os.fsencode(received.model) == b"/models/\xff\xfe"


@pytest.mark.parametrize(
    "parts",
    [
        None,
        7,
        "Heartbeat",
        [],
        ["Nothing"],
        [["Heartbeat"]],
        [b"Heartbeat"],
        ["Heartbeat", 1],
        {"Heartbeat": 1},
        {0: "Heartbeat"},
        ["Progress", 1],
        ["Progress", 1, 2, 3, 4],
        ["Progress", 1, 2.0],
        ["Progress", 1, True],
        ["Progress", 1, "2"],
        ["Failure", "ModelError", b"bytes"],
        ["LoadReport", 1, [1], [1], [1, None], [1]],
        ["LoadReport", 1, [1], [1], [True], [1]],
        ["LoadReport", 1, [1], [1], 1, [1]],
        ["Assignment", 0, "m", "", [0], "all", "text", 0, 1.0, 0],
        ["Assignment", 0, "m", "", [0], "all", b"", 0, 1, 0],
        ["Ready", 1, 2, {"a": 1.0}],
        ["Ready", 1, 2, {"a": True}],
        ["Ready", 1, 2, {"a": None}],
        ["Ready", 1, 2, {b"a": 1}],
        ["Ready", 1, 2, {1: 1}],
        ["Ready", 1, 2, [["a", 1]]],
        ["Ready", 1, 2, ["a"]],
        ["Ready", 1],
        ["Move", 1, "text"],
        ["Move", 1, [0, 0, 0]],
        ["Moved", 1, 2.0],
        ["encode"],
        [msgpack.Timestamp(0)],
    ],
)
def test_what_is_not_a_message_is_refused(parts: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(msgpack.packb(parts))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_truncated_or_lengthened_is_refused(message: Message) -> None:
    data = encode(message)
    for length in range(len(data)):
        with pytest.raises(ProtocolError):
            decode(data[:length])
    with pytest.raises(ProtocolError):
        decode(data + b"\x00")


def test_random_bytes_never_raise_anything_else() -> None:
    rng = random.Random(7)
    encodings = [encode(message) for message in MESSAGES]
    refused = 0
    for turn in range(30_000):
        if turn % 3:
            data = bytearray(rng.choice(encodings))
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            data = bytearray(rng.randbytes(rng.randint(0, 60)))
        try:
            message = decode(bytes(data))
        except ProtocolError:
            refused += 1
        else:  # a changed value is still a message; NaN is not equal to itself
            assert encode(decode(encode(message))) == encode(message)
    assert refused > 10_000


@pytest.mark.parametrize(
    "data", [b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_bombs_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_failure_carries_the_class_of_the_error() -> None:
    error = Failure.of(ModelError("no such tensor")).error("cpu0")
    assert type(error) is ModelError
    assert str(error) == "worker cpu0: no such tensor"
    assert type(Failure.of(UsageError("x")).error("cpu0")) is UsageError


def test_failure_that_was_not_on_purpose_names_its_class() -> None:
    error = Failure.of(ZeroDivisionError("division by zero")).error("cpu1")
    assert type(error) is WorkerError
    assert str(error) == "worker cpu1: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("kind", ["SystemExit", "__doc__", "os", ""])
def test_failure_of_unknown_kind_is_a_worker_error(kind: str) -> None:
    assert type(Failure(kind, "m").error("cpu0")) is WorkerError
