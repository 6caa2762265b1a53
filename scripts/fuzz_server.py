#!/usr/bin/env python3
"""Malformed requests to a running server: each gets an answer in OpenAI's form with a status below 500, or none at all.

    warmfront serve --port 8080 &
    python scripts/fuzz_server.py http://127.0.0.1:8080 --count 10000

Valid requests are damaged at random: values of other types and sizes, fields that are missing, bytes of the JSON, the
head of the request, connections that are cut or stall. The last line is JSON: how many requests got which status.
Exit code 1 if the server fails on one, which is printed with its seed, or if it is not there any more at the end.
"""

import argparse
import json
import random
import socket
import sys
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    1e308,
    -1e308,
    2**63,
    2**70,
    10**400,
    "",
    "a",
    "\x00",
    "\ud83d\ude00",
]
VALUES += [
    "x" * 5000,
    [],
    [[]],
    [0],
    [-1],
    [2**40],
    {},
    {"a": {}},
    [None],
    ["a", 1],
    "<think>",
    "<|im_end|>",
    "{{ 1 }}",
]
VALUES += [[["a"]] * 50, {"type": "function"}, {"type": "json_schema"}, "root ::= root", "(" * 500]
TEXT = {"prompt": "The sea", "max_tokens": 2, "temperature": 0, "n": 1, "stop": ["x"], "stream": False, "logprobs": 1}
TEXT |= {
    "seed": 1,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "echo": False,
    "model": "default",
}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "max_tokens": 2}
CHAT |= {"tools": [TOOL], "tool_choice": "auto", "stream": False, "logprobs": True, "top_logprobs": 2}
CHAT |= {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
CHAT |= {"stream_options": {"include_usage": True}, "max_completion_tokens": 2}
PATHS = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": CHAT,
    "/v1/embeddings": {"input": ["The sea", "Hi"], "encoding_format": "float", "pooling": "last", "model": "default"},
    "/tokenize": {"content": "The sea", "add_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {"messages": CHAT["messages"], "tools": [TOOL]},
}
# Each render starts a process, and each grammar is compiled: fewer of these.
WEIGHTS = [8, 2, 2, 4, 4, 1]
# What a request may not ask for by chance: thousands of tokens.
MOST = {"max_tokens": 3, "max_completion_tokens": 3, "n": 2}


def damaged(value: Any, chance: random.Random) -> Any:
    """A copy of `value` with one thing changed somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.25:
            return value | {chance.choice(["", "prompt", "messages", "\x00", "__class__"]): chance.choice(VALUES)}
        return value | {key: damaged(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], damaged(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def request(chance: random.Random, host: str, key: str | None) -> tuple[bytes, bool]:
    """The bytes of one request, and whether it is whole, so that an answer must come."""
    path = chance.choices(list(PATHS), WEIGHTS)[0]
    body: Any = PATHS[path]
    for _ in range(chance.randint(1, 3)):
        body = damaged(body, chance)
    if isinstance(body, dict):
        for name, most in MOST.items():
            if isinstance(body.get(name), int) and body[name] > most and chance.random() < 0.95:
                body = body | {name: most}
        if path in ("/v1/completions", "/v1/chat/completions") and not body.get("max_tokens"):
            body = body | ({"max_tokens": 2} if chance.random() < 0.95 else {})
    data = json.dumps(body).encode()
    if chance.random() < 0.15:  # bytes of the JSON itself
        torn = bytearray(data)
        for _ in range(chance.randint(1, 5)):
            torn[chance.randrange(len(torn))] = chance.randrange(256)
        data = bytes(torn)
    if chance.random() < 0.02:
        data = b"[" * chance.choice([100, 100_000])
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Connection: close"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines.append(f"Content-Length: {len(data)}")
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    kind = chance.random()
    if kind < 0.03:  # the head
        torn = bytearray(head)
        torn[chance.randrange(len(torn))] = chance.randrange(256)
        head = bytes(torn)
    elif kind < 0.05:  # less than was said: the connection is closed before the rest
        data = data[: len(data) // 2]
    elif kind < 0.06:
        head = chance.randbytes(chance.randint(1, 300))
    return head + data, kind >= 0.06


def ask(address: tuple[str, int], data: bytes, whole: bool, chance: random.Random) -> bytes:
    """What comes back, or nothing."""
    try:
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(data)
            if chance.random() < 0.03:
                return b""  # it does not wait for the answer
            found = b""
            connection.settimeout(60 if whole else 0.3)
            while chunk := connection.recv(65536):
                found += chunk
            return found
    except OSError:  # the server may close on what is no request
        return b""


def fault_of(answer: bytes) -> str | None:
    """What is wrong with an answer."""
    if not answer:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(None, 2)[1])
    if b"Traceback" in answer:
        return "a traceback"
    if status >= 500 or status < 200:
        return f"status {status}: {body[:300]!r}"
    if status >= 400 and b"application/json" in head:
        error = json.loads(body)["error"]
        if set(error) != {"message", "type", "param", "code"}:
            return f"an error in another form: {body[:300]!r}"
    return None


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("url")
    arguments.add_argument("--count", type=int, default=10_000)
    arguments.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--key")
    given = arguments.parse_args()
    host = urlsplit(given.url).netloc
    name, _, port = host.rpartition(":")
    address, seen, faults, until = (name, int(port)), Counter[str](), 0, time.monotonic() + given.seconds
    for seed in range(given.seed, given.seed + given.count):
        if time.monotonic() > until:
            break
        chance = random.Random(seed)
        data, whole = request(chance, host, given.key)
        answer = ask(address, data, whole, chance)
        seen[answer.split(None, 2)[1].decode() if answer.startswith(b"HTTP/") else "none"] += 1
        if fault := fault_of(answer):
            faults += 1
            print(f"seed {seed}: {fault}\n  {data[:600]!r}", file=sys.stderr)
    health = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    alive = b"200 OK" in ask(address, health.encode(), True, random.Random(1))
    print(
        json.dumps(
            {"requests": sum(seen.values()), "statuses": dict(sorted(seen.items())), "faults": faults, "alive": alive}
        )
    )
    return int(bool(faults) or not alive)


if __name__ == "__main__":
    sys.exit(main())
