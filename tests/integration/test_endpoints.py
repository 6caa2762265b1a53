"""Connections that stall, and the endpoints beside completions, on a server of a tiny model.

pytest tests/integration/test_endpoints.py
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.server import Server, eventually, serving

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.usefixtures("compiled")

CLIENT_S = 2
ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def server(tiny_llama: Callable[..., Path], compiled: None) -> Iterator[Server]:
    options = ["--name", "tiny", "--client-timeout", str(CLIENT_S), "--cors", ORIGIN, "--parallel", "2"]
    with serving(tiny_llama(hidden_act="relu"), *options) as server:
        yield server


def connect(server: Server, *, buffer: int | None = None) -> socket.socket:
    """A connection; `buffer`: bytes that the system takes for a client that does not read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


def head(server: Server, line: str, length: int | None = None) -> bytes:
    lines = [line, f"Host: {server.url.removeprefix('http://')}"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def figures(server: Server) -> dict[str, float]:
    """/metrics, the labels a part of the name."""
    lines = server.ask("/metrics").body.decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"POST /tokenize HTTP/1.1\r\nHo", None),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{", 408),
        # Nobody reads its body: the answer is there before it.
        (b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{", 404),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he", 200),
    ],
    ids=["nothing", "half a head", "half a body", "half a body for nobody", "half of a second request"],
)
def test_who_stops_sending_is_let_go(server: Server, sent: bytes, status: int | None) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    assert found.partition(b"\r\n")[0].split()[1:2] == ([b"%d" % status] if status else [])


def test_a_byte_now_and_then_gains_no_time(server: Server) -> None:
    with connect(server) as connection:
        connection.settimeout(0.1)
        began, sent = time.monotonic(), iter(head(server, "GET /health HTTP/1.1") * 9)

        def closed() -> bool:
            try:
                connection.sendall(bytes([next(sent)]))
                return connection.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        eventually(closed, 60)
        assert time.monotonic() - began > CLIENT_S / 2


def test_who_takes_nothing_is_let_go(server: Server) -> None:
    """A stream, whose answers are not computed any more, and files; whatever waits for the client is dropped."""
    before = descriptors(server)
    wanted = {"prompt": "On", "max_tokens": 450, "n": 16, "logprobs": 20, "stream": True, "ignore_eos": True}
    body = json.dumps(wanted).encode()
    with connect(server, buffer=4096) as stream, connect(server, buffer=4096) as files:
        stream.sendall(head(server, "POST /v1/completions HTTP/1.1", len(body)) + body)
        files.sendall(head(server, "GET /page.js HTTP/1.1") * 1000)
        eventually(lambda: descriptors(server) > before)
        eventually(lambda: descriptors(server) <= before, 60)
        counts = figures(server)
        assert counts["warmfront_requests_running"] == counts["warmfront_requests_waiting"] == 0
