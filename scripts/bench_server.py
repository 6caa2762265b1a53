#!/usr/bin/env python3
"""What a server gives: the rate of a stream and of several, and the first token behind a text that it has read before.

    python scripts/bench_server.py stream -m smollm2-135m     one stream's tok/s against `warmfront generate`, in turns
    python scripts/bench_server.py batch -m smollm2-135m      eight streams' tok/s against one's, in turns
    python scripts/bench_server.py prefix -m smollm2-135m     200 requests that share a text of 500 tokens: the first
                                                              token of the first one against that of the others
    python scripts/bench_server.py peer -m smollm2-135m       eight streams' tok/s against those of llama.cpp's server,
                                                              in turns; a GGUF file, and the path of `llama-server` in
                                                              WARMFRONT_LLAMA_SERVER

A stream's client runs on the same cores, and what it takes is a part of the ratio; so is what else runs there: believe
a quiet minute. The last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from serving.client import Reply, complete
from serving.process import Server, serving, started

from warmfront.coordinator.models.find import find_model

PROMPT = "The lighthouse keeper"
STREAMS, REQUESTS, PREFIX = 8, 200, 500
CONTEXT = 1024  # of a slot
PEER = "WARMFRONT_LLAMA_SERVER"


def _body(prompt: str | list[int], tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}


def _command(options: list[str], tokens: int) -> float:
    """Tokens a second of `warmfront generate`."""
    command = [sys.executable, "-m", "warmfront", "generate", *options, "-p", PROMPT, "-n", str(tokens)]
    done = subprocess.run([*command, "--ignore-eos", "--json"], capture_output=True, encoding="utf-8", check=True)
    return float(json.loads(done.stdout)["decode_tps"])


def stream(server: Server, options: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """One stream against the command."""
    rates: dict[str, list[float]] = {"command": [], "server": []}
    for _ in range(given.turns):
        rates["command"].append(_command(options, given.tokens))
        rates["server"].append(complete(server.address, _body(PROMPT, given.tokens)).rate)
    return _compared(rates, "server", "command")


def batch(server: Server, _options: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Eight streams against one."""
    rates: dict[str, list[float]] = {"one": [], "eight": []}
    for _ in range(given.turns):
        rates["one"].append(_rate_of(server, 1, given.tokens))
        rates["eight"].append(_rate_of(server, STREAMS, given.tokens))
    return _compared(rates, "eight", "one")


def peer(server: Server, _options: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Eight streams here against eight of llama.cpp's server, with as many slots, threads and tokens of context."""
    program, cores = os.environ.get(PEER, ""), str(len(os.sched_getaffinity(0)))
    if not os.access(program, os.X_OK):
        raise SystemExit(f"{PEER} must be the path of llama.cpp's `llama-server`")
    model = find_model(given.model, print, lambda *_: None)
    command = f"{program} --port 0 --no-webui -t {cores} -np {STREAMS} -c {STREAMS * CONTEXT} -m".split()
    rates: dict[str, list[float]] = {"warmfront": [], "llama.cpp": []}
    with started([*command, str(model)], r"listening on (http://\S+)") as other:
        _rate_of(other, STREAMS, 32)
        for _ in range(given.turns):
            rates["warmfront"].append(_rate_of(server, STREAMS, given.tokens))
            rates["llama.cpp"].append(_rate_of(other, STREAMS, given.tokens))
    return _compared(rates, "warmfront", "llama.cpp")


def _rate_of(server: Server, count: int, tokens: int) -> float:
    """Tokens a second of so many streams at once, from the request to the last token."""
    replies: list[Reply] = []

    def ask(number: int) -> None:
        replies.append(complete(server.address, _body(f"{PROMPT} {number}", tokens)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.whole for reply in replies] == [True] * count, replies
    return count * tokens / (time.perf_counter() - begun)


def prefix(server: Server, _options: list[str], _given: argparse.Namespace) -> dict[str, Any]:
    """The time to the first token behind what was read before."""
    chance = random.Random(0)
    shared = [chance.randrange(1000, 20_000) for _ in range(PREFIX)]
    complete(server.address, _body([chance.randrange(1000, 20_000) for _ in range(PREFIX)], 2))  # as warm as later
    times = []
    for _ in range(REQUESTS):
        reply = complete(server.address, _body(shared + [chance.randrange(1000, 20_000) for _ in range(8)], 2))
        assert reply.whole, reply
        times.append(reply.first_s)
    first, others = times[0], sorted(times[1:])
    found = {f"p{part}": round(others[len(others) * part // 100], 4) for part in (50, 90, 99)}
    ratio = round(statistics.median(others) / first, 3)
    return {"first_s": round(first, 4), "others_s": found, "ratio": ratio}


def _compared(rates: dict[str, list[float]], what: str, to: str) -> dict[str, Any]:
    shown = {f"{name}_tok_s": [round(rate, 1) for rate in found] for name, found in rates.items()}
    return shown | {"ratio": round(statistics.median(rates[what]) / statistics.median(rates[to]), 3)}


# How each is measured, and with how many slots.
MEASURES = {"stream": (stream, 1), "batch": (batch, STREAMS), "prefix": (prefix, 1), "peer": (peer, STREAMS)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("what", choices=list(MEASURES))
    arguments.add_argument("-m", "--model", required=True)
    arguments.add_argument("--tokens", type=int, default=256)
    arguments.add_argument("--turns", type=int, default=5)
    arguments.add_argument("--selector", default="auto")
    given = arguments.parse_args()
    options = ["-m", given.model, "--ctx", str(CONTEXT), "--selector", given.selector]
    measure, slots = MEASURES[given.what]
    with serving([*options, "--parallel", str(slots)]) as server:
        complete(server.address, _body(PROMPT, 32))
        print(json.dumps({"what": given.what} | measure(server, options, given)))


if __name__ == "__main__":
    main()
