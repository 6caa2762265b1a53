"""Connections that stall, and the endpoints beside completions, on a server of a tiny model.

pytest tests/integration/test_endpoints.py
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModel

from tests.integration.server import Server, eventually, serving

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("compiled")

CLIENT_S = 2
ORIGIN = "https://page.example"
TEXT = {"type": "text", "text": "Hi."}


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


def busy(server: Server) -> float:
    """Requests that it has not ended."""
    counts = figures(server)
    return counts["warmfront_requests_running"] + counts["warmfront_requests_waiting"]


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
        eventually(lambda: busy(server) == 0)


def test_metrics_move(server: Server) -> None:
    before = figures(server)
    board = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8")
    names = set(re.findall(r"warmfront_\w+", board))
    assert len(names) > 10
    present = {name.partition("{")[0] for name in before}
    assert names <= present | {"warmfront_requests_total"}  # which begins with the first answer
    prompt = "The lighthouse keeper wrote in his diary that the sea had been calm for 12 days." * 2
    for _ in range(2):
        wanted = {"prompt": prompt, "max_tokens": 5, "ignore_eos": True}
        assert server.ask("/v1/completions", wanted).status == 200
    assert server.ask("/v1/completions", {"prompt": ""}).status == 400
    moved = {name: value - before.get(name, 0) for name, value in figures(server).items()}
    assert moved["warmfront_generated_tokens_total"] == 10
    assert 0 < moved["warmfront_prompt_tokens_cached_total"] < moved["warmfront_prompt_tokens_total"]
    assert moved["warmfront_time_to_first_token_seconds_count"] == 2
    assert moved["warmfront_inter_token_seconds_count"] == 8
    assert moved["warmfront_answer_seconds_count"] == 2
    assert moved["warmfront_tokens_per_pass_count"] == 10
    assert moved['warmfront_requests_total{path="/v1/completions",status="200"}'] == 2
    assert moved['warmfront_requests_total{path="/v1/completions",status="400"}'] == 1
    assert moved['warmfront_worker_busy_seconds_total{worker="cpu0"}'] > 0
    assert moved['warmfront_worker_neurons_total{worker="cpu0"}'] > 0
    assert moved["warmfront_workers_replaced_total"] == 0


def test_text_and_tokens(server: Server) -> None:
    text = "The sea, 12 days"
    ids = server.ask("/tokenize", {"content": text}).json()["tokens"]
    assert server.ask("/detokenize", {"tokens": ids}).json() == {"content": text}
    pieces = server.ask("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert "".join(piece["piece"] for piece in pieces) == text
    assert server.ask("/detokenize", {"tokens": [10**6]}).json()["error"]["message"].count("vocabulary") == 1


def test_a_template_is_applied(server: Server) -> None:
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [TEXT, TEXT]}]
    prompt = server.ask("/apply-template", {"messages": turns}).json()["prompt"]
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.Hi.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert server.ask("/apply-template", {"messages": []}).json()["error"]["param"] == "messages"


def test_pages_of_other_origins(server: Server) -> None:
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    allowed = server.ask("/v1/completions", method="OPTIONS", Origin=ORIGIN, **asks)
    assert allowed.status == 200
    names = {name.lower(): value for name, value in allowed.headers.items()}
    assert names["access-control-allow-origin"] == ORIGIN
    assert "authorization" in names["access-control-allow-headers"].lower()
    assert server.ask("/v1/models", Origin=ORIGIN).headers["access-control-allow-origin"] == ORIGIN
    assert server.ask("/v1/completions", method="OPTIONS", Origin="https://evil.example", **asks).status == 400
    assert server.ask("/v1/models", Origin="https://evil.example").status == 403


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_calls_come_apart(server: Server, stream: bool) -> None:
    """A grammar has the model say it."""
    said = '<think>why</think>Yes. <tool_call>{\\"name\\": \\"f\\", \\"arguments\\": {\\"a\\": 1}}</tool_call>'
    wanted = {"messages": [{"role": "user", "content": "Hi"}], "grammar": f'root ::= "{said}"', "stream": stream}
    wanted["tools"] = [{"type": "function", "function": {"name": "f"}}]
    reply = server.ask("/v1/chat/completions", wanted)
    if stream:
        events = [line.removeprefix(b"data: ") for line in reply.body.split(b"\n\n") if line]
        assert events.pop() == b"[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        parts = [choice["delta"] for choice in choices]
    else:
        choices = reply.json()["choices"]
        parts = [choice["message"] for choice in choices]
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert "".join(part.get("reasoning_content") or "" for part in parts) == "why"
    assert "".join(part.get("content") or "" for part in parts).strip() == "Yes."
    (call,) = [call["function"] for part in parts for call in part.get("tool_calls", [])]
    assert call["name"] == "f"
    assert json.loads(call["arguments"]) == {"a": 1}


@pytest.fixture(scope="module")
def hidden_states(tiny_llama: Callable[..., Path]) -> Callable[[list[int]], npt.NDArray[np.float32]]:
    """Of token ids, behind the last norm, by transformers: float32 [tokens, hidden]."""
    model = AutoModel.from_pretrained(tiny_llama(hidden_act="relu"), dtype=torch.float32)

    def states(ids: list[int]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(model(torch.tensor([ids])).last_hidden_state[0].numpy())

    return states


def test_embeddings(server: Server, hidden_states: Callable[[list[int]], npt.NDArray[np.float32]]) -> None:
    """By OpenAI's client, which asks for base64 unless told otherwise; more than one job is needed for the last."""
    texts = ["The sea", "front", "had been calm for 12 days. " * 15]
    prompts = [server.ask("/tokenize", {"content": text, "add_special": True}).json()["tokens"] for text in texts]
    assert len(prompts[-1]) > 96
    before = figures(server)["warmfront_embedded_tokens_total"]
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        packed = client.embeddings.create(model="tiny", input=texts)
        plain = client.embeddings.create(model="tiny", input=prompts, encoding_format="float")
        last = client.embeddings.create(model="tiny", input=texts[0], extra_body={"pooling": "last"})
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="tiny", input="a", dimensions=7)
        with pytest.raises(openai.BadRequestError, match="the context holds"):
            client.embeddings.create(model="tiny", input=[[5] * 1000])
    assert [found.index for found in packed.data] == [0, 1, 2]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == sum(map(len, prompts))
    for ids, one, other in zip(prompts, packed.data, plain.data, strict=True):
        expected = hidden_states(ids).mean(0)
        np.testing.assert_allclose(one.embedding, expected / np.linalg.norm(expected), atol=2e-4)
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
    expected = hidden_states(prompts[0])[-1]
    np.testing.assert_allclose(last.data[0].embedding, expected / np.linalg.norm(expected), atol=2e-4)
    tokens = 2 * packed.usage.total_tokens + last.usage.total_tokens
    assert figures(server)["warmfront_embedded_tokens_total"] - before == tokens
    wrong = server.ask("/v1/embeddings", {"input": []})
    assert wrong.status == 400
    assert set(wrong.json()["error"]) == {"message", "type", "param", "code"}
