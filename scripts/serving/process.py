"""`warmfront serve`, or a peer's server, as a script's own process: started, asked for its memory, ended."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["Server", "serving", "started"]


class Server:
    """A server that listens."""

    def __init__(self, process: "subprocess.Popen[str]", address: tuple[str, int]) -> None:
        self.process, self.address = process, address

    def workers(self) -> list[int]:
        """The processes of the CPU workers that there are now."""
        return [pid for pid in _children(self.process.pid) if "cpu_worker" in _command(pid)]

    def memory(self) -> dict[str, int]:
        """Bytes that the server and its workers have: resident in all, and of these without a file behind them."""
        found = {"resident": 0, "anonymous": 0}
        for pid in [self.process.pid, *_children(self.process.pid)]:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
            except OSError:  # it has ended meanwhile
                continue
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
            found["resident"] += sizes.get("Pss", 0)
            found["anonymous"] += sizes.get("Anonymous", 0)
        return found


@contextmanager
def serving(options: Sequence[str]) -> Iterator[Server]:
    """A server with these options on a port of its own. Raises SystemExit if it does not start or end well."""
    command = [sys.executable, "-m", "warmfront", "serve", "--port", "0", *options]
    with started(command, r"serving .* at (http://\S+)") as server:
        yield server


@contextmanager
def started(command: Sequence[str], says: str) -> Iterator[Server]:
    """A server of any kind, whose stderr tells its address as the group of the pattern `says`. Raises as `serving`."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stderr is not None
    said: list[str] = []
    listening = threading.Thread(target=said.extend, args=(process.stderr,))  # a full pipe would hold it up
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(says, line):
                url = urlsplit(found[1])
                listening.start()
                yield Server(process, (url.hostname or "", url.port or 0))
                break
        process.send_signal(signal.SIGTERM)
        if process.wait() != 0:
            raise SystemExit("".join(said))
    finally:
        process.kill()
        process.wait()
        if listening.ident is not None:
            listening.join()
        process.stderr.close()


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return [
            int(each) for task in tasks for each in Path(f"/proc/{pid}/task/{task}/children").read_text("ascii").split()
        ]
    except OSError:  # a thread, or the process, has ended meanwhile
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""
