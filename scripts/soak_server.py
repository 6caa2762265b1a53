#!/usr/bin/env python3
"""Many clients of one server while its CPU workers are killed: no answer may be lost or wrong, no memory kept.

    python scripts/soak_server.py -m smollm2-135m --requests 1000 --kill-every 10
    python scripts/soak_server.py -m smollm2-135m --requests 2000 --kill-every 0

Half of the requests stream, half begin with a text that others begin with too, and most have been asked before: their
greedy answers must be the same each time, whoever else is served and whichever worker has died meanwhile. Some clients
vanish in the middle of a stream, others read slowly. A worker is killed at the earliest when an answer has come since
the last one was: a successor takes one or two seconds to start, more on a busy machine, and a server whose workers die
three times in a row before they serve ends. The last line is JSON: latencies in seconds, memory in bytes when parts of
the requests were answered. Exit code 1 if an answer was lost or differed.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from statistics import median
from typing import Any

from serving.client import Reply, complete, get
from serving.process import Server, serving

WORDS = [
    "the",
    "sea",
    "ship",
    "keeper",
    "lamp",
    "storm",
    "night",
    "rope",
    "light",
    "wave",
    "north",
    "wind",
    "letter",
    "gull",
]
SHARED = [" ".join(random.Random(seed).choices(WORDS, k=200)) for seed in range(3)]
PARTS = (0.05, 0.25, 0.5, 0.75, 1.0)
VANISH, SLOW = 0.05, 0.05
REPLACED_S = 60.0  # after which a killed worker's successor is not waited for
# Of the prompts, which repeat so that their answers can be compared.
PROMPTS = 60


class Soak:
    """The requests of one run: who is next, and what came of them."""

    def __init__(self, server: Server, requests: int, seed: int) -> None:
        self.server, self.requests, self.seed = server, requests, seed
        self.replies: list[Reply] = []
        self.faults: list[str] = []
        self.memory: list[dict[str, float]] = []
        self._taken, self._answers = 0, dict[tuple[str, int], str]()
        self._lock = threading.Lock()

    def client(self) -> None:
        """One request after another, until all are taken."""
        while (number := self._take()) is not None:
            self._ask(number)

    @property
    def done(self) -> int:
        return len(self.replies) + len(self.faults)

    def _take(self) -> int | None:
        with self._lock:
            if self._taken == self.requests:
                return None
            self._taken += 1
            return self._taken - 1

    def _ask(self, number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        body, kind = _request(chance), chance.random()
        leaves = body["stream"] and kind < 2 * VANISH
        slow = body["stream"] and 2 * VANISH <= kind < 2 * (VANISH + SLOW)
        try:
            reply = complete(self.server.address, body, leave_after=500 * leaves, pause_s=0.2 * slow)
        except OSError as error:
            reply = Reply(0, str(error))
        with self._lock:
            known = self._answers.setdefault((body["prompt"], body["max_tokens"]), reply.text) if reply.whole else ""
            if not reply.whole and not reply.left:
                self.faults.append(f"request {number} was lost: status {reply.status} {reply.text[:200]!r}")
            elif reply.whole and known != reply.text:
                self.faults.append(f"request {number} got {reply.text!r}, and {known!r} before")
            else:
                self.replies.append(reply)
            if self.done in {round(part * self.requests) for part in PARTS}:
                self.memory.append({"at": self.done / self.requests} | self.server.memory())


def _request(chance: random.Random) -> dict[str, Any]:
    """A completion of 8 to 16 tokens."""
    prompt = random.Random(chance.randrange(PROMPTS))
    text = " ".join(prompt.choices(WORDS, k=prompt.randint(5, 40)))
    if prompt.random() < 0.5:
        text = f"{prompt.choice(SHARED)} {text}"
    most = prompt.randint(8, 16)
    return {"prompt": text, "max_tokens": most, "temperature": 0, "ignore_eos": True, "stream": chance.random() < 0.5}


def kill_workers(soak: Soak, every_s: float, most: int) -> tuple[int, int, list[float]]:
    """Until the requests are done kill a CPU worker every so often, but none before an answer has come behind the last.

    Returns how many, how many came in their place, and seconds from each to the first answer behind it.
    """
    kills, last, done, seen = 0, time.monotonic(), -1, set(soak.server.workers())
    first, waits = len(seen), list[float]()
    while soak.done < soak.requests or (len(seen) - first < kills and time.monotonic() - last < REPLACED_S):
        time.sleep(0.1)
        workers = soak.server.workers()
        seen |= set(workers)
        if soak.done > done >= 0:
            waits.append(time.monotonic() - last)
            done = -1
        due = every_s and kills < most and time.monotonic() - last >= every_s and done < 0
        if due and workers and soak.done < soak.requests:
            os.kill(random.Random(kills).choice(workers), signal.SIGKILL)
            kills, last, done = kills + 1, time.monotonic(), soak.done
    return kills, len(seen) - first, waits


def report(soak: Soak, kills: int, replaced: int, waits: list[float], seconds: float) -> dict[str, Any]:
    """What the last line says."""
    whole = [reply for reply in soak.replies if reply.whole]
    memory = {at["at"]: at for at in soak.memory}
    times = sorted(reply.total_s for reply in whole)
    growth = {
        kind: round(memory[1.0][kind] / memory[0.25][kind] - 1, 4)
        for kind in ("resident", "anonymous")
        if {0.25, 1.0} <= set(memory)
    }
    try:
        health = json.loads(get(soak.server.address, "/health"))["status"]
    except OSError:
        health = "it has ended"
    return {
        "requests": soak.requests,
        "whole": len(whole),
        "vanished": sum(reply.left for reply in soak.replies),
        "lost": len(soak.faults),
        "seconds": round(seconds, 1),
        "latency_s": {f"p{part}": round(times[len(times) * part // 100], 3) for part in (50, 90, 99) if times},
        "kills": kills,
        "replaced": replaced,
        "first_answer_behind_kill_s": {"median": round(median(waits), 1), "most": round(max(waits), 1)}
        if waits
        else {},
        "memory": soak.memory,
        "growth_25_to_100": growth,
        "health": health,
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("-m", "--model", required=True)
    arguments.add_argument("--requests", type=int, default=1000)
    arguments.add_argument("--clients", type=int, default=12)
    arguments.add_argument("--parallel", type=int, default=4)
    arguments.add_argument("--kill-every", type=float, default=10.0, help="seconds, and an answer between; 0: never")
    arguments.add_argument("--most-kills", type=int, default=10**6)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    options = ["-m", given.model, "--ctx", "1024", "--parallel", str(given.parallel)]
    with serving(options) as server:
        soak, begun = Soak(server, given.requests, given.seed), time.monotonic()
        threads = [threading.Thread(target=soak.client) for _ in range(given.clients)]
        for thread in threads:
            thread.start()
        kills, replaced, waits = kill_workers(soak, given.kill_every, given.most_kills)
        for thread in threads:
            thread.join()
        for fault in soak.faults[:20]:
            print(fault, file=sys.stderr)
        if (late := sum(wait > given.kill_every for wait in waits)) > 0:
            print(
                f"{late} of {kills} kills were followed by no answer within --kill-every {given.kill_every:g} s: those "
                "behind them came later than asked",
                file=sys.stderr,
            )
        found = report(soak, kills, replaced, waits, time.monotonic() - begun)
    print(json.dumps(found))
    return int(bool(soak.faults) or found["health"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
