"""A hub on loopback that speaks what huggingface_hub asks of the real one: repositories, files, ranges, refusals."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
# Files from this size on are known by their SHA-256, others by git's SHA-1.
LARGE = 1000
PIECE = 1 << 16


class FakeHub:
    """What the hub has, how it misbehaves, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revision = REVISION
        # Repository or file to the status and the headers that it is refused with.
        self.refused: dict[str, tuple[int, dict[str, str]]] = {}
        # Bytes after which an answer breaks off, for the next so many answers that are longer.
        self.cut_at, self.cuts = 0, 0
        # Bytes after which an answer waits until `go_on`, and whether one does.
        self.stall_at = 0
        self.stalled, self.go_on = threading.Event(), threading.Event()
        # Method, path, Range and Authorization of each request.
        self.asked: list[tuple[str, str, str | None, str | None]] = []
        self.url = ""

    def put(self, repository: str, files: Mapping[str, bytes | str]) -> None:
        found = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        self.repositories.setdefault(repository, {}).update(found)

    def fetched(self) -> list[str]:
        """The files that were asked for, each as often as it was."""
        files = [re.fullmatch(r"/.+?/resolve/\w+/(.+)", path) for method, path, *_ in self.asked if method == "GET"]
        return [file[1] for file in files if file]

    def ranges(self) -> list[str | None]:
        """The Range of each request for a file."""
        return [part for method, path, part, _ in self.asked if method == "GET" and "/resolve/" in path]

    def etag(self, data: bytes) -> str:
        if len(data) >= LARGE:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Run `hub` on a free port until the block ends."""

    class Handler(_Handler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # so that closing it waits for its threads
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        fake, path = self.fake, unquote(urlsplit(self.path).path)
        fake.asked.append((self.command, path, self.headers["Range"], self.headers["Authorization"]))
        if match := re.fullmatch(r"/api/models/(.+)/revision/main", path):
            self._describe(match[1])
        elif match := re.fullmatch(r"/(.+?)/resolve/(\w+)/(.+)", path):
            self._file(match[1], match[3])
        else:
            self._end(404, {})

    def _refused(self, *what: str) -> bool:
        for each in what:
            if each in self.fake.refused:
                self._end(*self.fake.refused[each])
                return True
        return False

    def _describe(self, repository: str) -> None:
        if self._refused(repository):
            return
        if repository not in self.fake.repositories:
            self._end(404 if self.headers["Authorization"] else 401, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = []
        for name, data in self.fake.repositories[repository].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": self.fake.etag(data)}
            if len(data) >= LARGE:
                entry["lfs"] = {"sha256": self.fake.etag(data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        facts = {"id": repository, "sha": self.fake.revision, "private": False, "tags": [], "siblings": siblings}
        self._end(200, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def _file(self, repository: str, file: str) -> None:
        if self._refused(f"{repository}:{file}", repository):
            return
        data = self.fake.repositories[repository].get(file)
        if data is None:
            self._end(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.fake.revision})
            return
        headers = {"X-Repo-Commit": self.fake.revision, "ETag": f'"{self.fake.etag(data)}"', "Accept-Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers["Range"] or "")
        if start is None:
            self._end(200, headers, data)
        else:
            at = int(start[1])
            self._end(206, headers | {"Content-Range": f"bytes {at}-{len(data) - 1}/{len(data)}"}, data[at:])

    def _end(self, status: int, headers: Mapping[str, str], data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fake, end = self.fake, len(data)
        if fake.cuts and end > fake.cut_at:
            fake.cuts -= 1
            end = fake.cut_at
        try:
            for at in range(0, end, PIECE):
                if 0 < fake.stall_at <= at and not fake.go_on.is_set():
                    fake.stalled.set()
                    fake.go_on.wait(60)
                self.wfile.write(data[at : min(at + PIECE, end)])
        except OSError:  # the other side has gone
            pass
