"""A running `warmfront serve`, for tests."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from tests.integration.command import WARMFRONT

START_S = 120


class Reply(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """Its process, and plain requests to it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.url = process, ""
        self.lines: list[str] = []

    def wait(self) -> None:
        """Until it serves."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving .* at (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError("".join(self.lines))

    def ask(self, path: str, body: Any = None, *, method: str | None = None, **headers: str) -> Reply:
        """One request; `body` is bytes, or what becomes JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, names, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Reply(answer.status, answer.read(), dict(answer.headers))
        except HTTPError as error:
            with error:
                return Reply(error.code, error.read(), dict(error.headers))

    def stop(self) -> tuple[int, str]:
        """End it as a service manager does; its exit code and what it has said since."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        return self.process.wait(30), said


@contextmanager
def serving(model: str | Path, *options: str) -> Iterator[Server]:
    """A server of `model` on a port of its own; it must end well and say nothing of a failure."""
    command = [WARMFRONT, "serve", "-m", os.fspath(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    server = Server(process)
    try:
        server.wait()
        yield server
        if process.poll() is None:
            code, said = server.stop()
            assert code == 0, said
            assert "Traceback" not in said
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def eventually(condition: Any, within_s: float = 10) -> None:
    """Fail unless `condition()` holds soon."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
