"""Text completions over a socket each, and when their tokens came; cheap enough to time a server on the same cores."""

import json
import socket
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["Reply", "complete", "get"]

_PATIENCE_S = 600.0  # longer than any pause of the machine


@dataclass(slots=True)
class Reply:
    """What came back. Times are in seconds since the request was sent; `first_s` is that of the body's first byte."""

    status: int
    text: str = ""
    finish: str | None = None
    first_s: float = 0.0
    total_s: float = 0.0
    # Of a stream: its first to its last event with text, and how many those are.
    events: int = 0
    left: bool = False

    @property
    def whole(self) -> bool:
        return self.status == 200 and self.finish is not None

    @property
    def rate(self) -> float:
        """Tokens a second of a stream whose tokens all have text, without the first."""
        return (self.events - 1) / (self.total_s - self.first_s)


def complete(address: tuple[str, int], body: dict[str, Any], *, leave_after: int = 0, pause_s: float = 0.0) -> Reply:
    """Ask for a completion. Raises OSError.

    `leave_after`: close behind so many bytes of its body; `pause_s`: wait that long before each reading.
    """
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as connection:
        connection.settimeout(_PATIENCE_S)
        if pause_s:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        begun = time.perf_counter()
        connection.sendall(head.encode() + data)
        found, began_at, first_s, last_s = bytearray(), 0, 0.0, 0.0
        while chunk := connection.recv(65536):
            found += chunk
            last_s = time.perf_counter() - begun
            if not began_at:
                began_at = found.find(b"\r\n\r\n") + 4
                began_at = 0 if began_at == 3 else began_at
            if began_at and not first_s and len(found) > began_at:
                first_s = last_s
            if leave_after and first_s and len(found) - began_at >= leave_after:
                return Reply(200, first_s=first_s, total_s=last_s, left=True)
            if pause_s:
                time.sleep(pause_s)
    return _read(bytes(found), bool(body.get("stream")), first_s, last_s)


def get(address: tuple[str, int], path: str) -> str:
    """The body of an answer to a GET. Raises OSError."""
    with socket.create_connection(address, timeout=_PATIENCE_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    return found.partition(b"\r\n\r\n")[2].decode()


def _read(found: bytes, streamed: bool, first_s: float, total_s: float) -> Reply:
    head, _, body = found.partition(b"\r\n\r\n")
    reply = Reply(int(head.split(None, 2)[1]) if head else 0, first_s=first_s, total_s=total_s)
    if reply.status != 200:
        reply.text = body.decode(errors="replace")
    elif streamed:
        ended = False
        for event in _unchunked(body).decode().split("\n\n"):
            kind, _, content = event.partition(": ")  # or a comment, by which a server shows that it is there
            ended = ended or content == "[DONE]"
            if kind == "data" and content != "[DONE]":
                _add(reply, json.loads(content))
        reply.finish = reply.finish if ended else None
    else:
        _add(reply, json.loads(body))
    return reply


def _add(reply: Reply, answer: dict[str, Any]) -> None:
    for choice in answer.get("choices", ()):
        reply.text += choice["text"]
        reply.events += bool(choice["text"])
        reply.finish = choice["finish_reason"] or reply.finish


def _unchunked(body: bytes) -> bytes:
    """The data of a body in chunks, as far as it came."""
    found, at = b"", 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:end], 16)
        found += body[end + 2 : end + 2 + size]
        at = end + 4 + size
    return found
