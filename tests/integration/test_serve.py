"""OpenAI's own client, lm-eval and plain requests against a running server of SmolLM2.

pytest tests/integration/test_serve.py
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import assert_refused, run
from tests.integration.server import Server, eventually, serving
from warmfront.coordinator.engine.batching.batcher import Batcher
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.serve import connections
from warmfront.coordinator.serve.app import make_app
from warmfront.coordinator.serve.run import HttpServer, bound, serve
from warmfront.coordinator.serve.service import Service
from warmfront.shared.errors import WarmfrontError

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytestmark = pytest.mark.usefixtures("compiled")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]},
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LARGE = {"function": {"name": "f", "parameters": {"properties": {str(i): {"type": "string"} for i in range(9000)}}}}
QUESTION = [{"role": "user", "content": "Name three colours."}]
KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def server(smollm2: Path, compiled: None) -> Iterator[Server]:
    with serving(smollm2, "--name", "smol", "--api-key", KEY, "--ctx", "1024", "--max-body", "1") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def greedy(smollm2: Path, count: int) -> str:
    """What the command answers."""
    options = ["-m", smollm2, "--ctx", "1024", "--chat", "-p", QUESTION[0]["content"], "-n", str(count), "--json"]
    return str(json.loads(run("generate", *options).out)["text"])


def test_the_client_gets_what_the_command_prints(client: Any, smollm2: Path) -> None:
    expected = greedy(smollm2, 16)
    answer = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    stream = client.chat.completions.create(
        model="smol",
        messages=QUESTION,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == "length"


def test_the_asynchronous_client_and_several_answers(server: Server) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:

            async def streamed() -> str:
                stream = await client.completions.create(
                    model="smol", prompt="The sea", max_tokens=8, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            several = client.completions.create(model="smol", prompt="The sea", max_tokens=8, seed=5, n=3)
            again = client.completions.create(model="smol", prompt="The sea", max_tokens=8, seed=5, n=3)
            plain = client.completions.create(model="smol", prompt="The sea", max_tokens=8, temperature=0)
            return list(await asyncio.gather(several, again, plain, streamed()))

    several, again, plain, streamed = asyncio.run(ask())
    texts = [choice.text for choice in several.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert plain.choices[0].text == streamed
    assert [choice.index for choice in several.choices] == [0, 1, 2]


def test_stop_and_token_ids_and_echo(client: Any, server: Server) -> None:
    ids = server.ask("/v1/completions", {"prompt": [504, 4272], "max_tokens": 3}, Authorization=f"Bearer {KEY}")
    assert ids.status == 200
    whole = client.completions.create(model="smol", prompt="One, two, three,", max_tokens=12, temperature=0, echo=True)
    text = whole.choices[0].text
    assert text.startswith("One, two, three,")
    word = text.removeprefix("One, two, three,").split()[1]
    cut = client.completions.create(
        model="smol", prompt="One, two, three,", max_tokens=12, temperature=0, stop=[word, "nothing"]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == text.removeprefix("One, two, three,").partition(word)[0]


def test_log_probabilities(client: Any, smollm2: Path) -> None:
    options = ["-m", smollm2, "--ctx", "1024", "--prompt-ids", "504,4272", "-n", "4", "--json", "--logprobs", "3"]
    expected = json.loads(run("generate", *options).out)["logprobs"]
    answer = client.completions.create(model="smol", prompt=[504, 4272], max_tokens=4, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([each["logprob"] for each in expected], abs=0.02)
    assert len(logprobs.top_logprobs[0]) == 3
    assert logprobs.text_offset[0] == 0
    chat = client.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert "".join(bytes(entry.bytes).decode() for entry in content) == chat.choices[0].message.content
    assert content[0].logprob == content[0].top_logprobs[0].logprob >= content[0].top_logprobs[1].logprob


def test_an_answer_fits_a_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="smol", messages=QUESTION, response_format=form, max_tokens=80, seed=seed, temperature=1.3
        )
        person = json.loads(answer.choices[0].message.content)
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)
        assert len(person["name"]) <= 12
        assert answer.choices[0].finish_reason == "stop"
    some = client.chat.completions.create(
        model="smol", messages=QUESTION, response_format={"type": "json_object"}, max_tokens=200, seed=1, temperature=0
    )
    if some.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(some.choices[0].message.content), dict)
    word = client.completions.create(
        model="smol", prompt="Say", max_tokens=9, extra_body={"grammar": 'root ::= "front" | "warm"'}
    )
    assert word.choices[0].text in ("front", "warm")


def test_tools(client: Any) -> None:
    wanted = {"model": "smol", "messages": QUESTION, "tools": [WEATHER], "max_tokens": 60}
    answer = client.chat.completions.create(**wanted, tool_choice="required", seed=2)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    assert answer.choices[0].finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(client.chat.completions.create(**wanted, tool_choice=named, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert json.loads("".join(call.function.arguments for call in calls))["city"] in ("Paris", "Oslo")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # What it gave is answered by a turn of the tool.
    said = answer.choices[0].message.model_dump(exclude_none=True)
    turns = [*QUESTION, said, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.chat.completions.create(model="smol", messages=turns, max_tokens=3).choices[0].finish_reason


def test_who_leaves_is_not_computed_for(server: Server, client: Any) -> None:
    """A stream that is closed, and a connection that is cut while the whole answer is awaited."""
    stream = client.completions.create(
        model="smol", prompt="On", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "On", "max_tokens": 900, "ignore_eos": True}).encode()
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {KEY}"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    for _ in range(3):
        with socket.create_connection((host, int(port))) as cut:
            cut.sendall(head.encode() + body)
    began = time.monotonic()
    client.completions.create(model="smol", prompt="On", max_tokens=1)
    assert time.monotonic() - began < 5  # four answers of 900 tokens would take longer


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": ""}, 400, "empty"),
        ("/v1/completions", {"prompt": [10**6]}, 400, "outside the vocabulary"),
        ("/v1/completions", {"prompt": "word " * 2000}, 400, "the context holds 1024"),
        ("/v1/completions", {"prompt": "a", "grammar": "root ::= ("}, 400, "grammar"),
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b" " * (1 << 20) + b"{}", 413, "larger"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": QUESTION, "model": "gpt-5"}, 404, "no model"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": ""}]}, 400, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "text only",
        ),
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}},
            400,
            "response_format",
        ),
        # It would take minutes to prepare, on threads that others wait for.
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "tools": [LARGE], "tool_choice": "required"},
            400,
            "too big",
        ),
        ("/v1/nothing", {}, 404, "/v1/nothing"),
    ],
)
def test_wrong_requests(server: Server, path: str, body: Any, status: int, words: str) -> None:
    reply = server.ask(path, body, Authorization=f"Bearer {KEY}")
    assert reply.status == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "Traceback" not in error["message"]


def test_keys_hosts_and_origins(server: Server) -> None:
    assert server.ask("/health").json() == {"status": "ok"}
    assert server.ask("/v1/models").status == 401
    assert server.ask("/v1/models", Authorization="Bearer other").json()["error"]["code"] == "invalid_api_key"
    assert server.ask("/v1/models", Authorization=f"Bearer {KEY}").json()["data"][0]["id"] == "smol"
    assert server.ask("/v1/models/smol", Authorization=f"Bearer {KEY}").status == 200
    assert server.ask("/v1/models", Authorization=f"Bearer {KEY}", Origin="https://evil.example").status == 403
    assert server.ask("/v1/models", Authorization=f"Bearer {KEY}", Origin="http://[").status == 403
    assert server.ask("/v1/completions", method="DELETE", Authorization=f"Bearer {KEY}").status == 405


def test_malformed_requests(server: Server) -> None:
    """Some seconds of what scripts/fuzz_server.py does for long."""
    script = Path(__file__).parents[2] / "scripts" / "fuzz_server.py"
    command = [sys.executable, script, server.url, "--key", KEY, "--seconds", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    told = json.loads(done.stdout)
    assert told["requests"] > 10
    assert told["statuses"]["400"] > 0


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval(server: Server, tmp_path: Path) -> None:
    """Its model of chat servers, unchanged, on a task of its own."""
    (tmp_path / "data.json").write_text("\n".join(json.dumps({"q": q, "a": "x"}) for q in ("Name a colour.", "Hi")))
    (tmp_path / "task.yaml").write_text(f"""\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.json}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""")
    arguments = f"model=smol,base_url={server.url}/v1/chat/completions,num_concurrent=2,tokenized_requests=False"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args", arguments]
    command += ["--tasks", "colours", "--include_path", str(tmp_path), "--apply_chat_template", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    settings = {"OPENAI_API_KEY": KEY, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 2
    assert all(answers)


def test_what_cannot_be_served() -> None:
    # The key is longer than any name of a file.
    assert_refused(run("serve", "--host", "nowhere.invalid", "--api-key", "k" * 300), 2, "no address")
    assert_refused(run("serve", "--api-key", "a b"), 2, "--api-key")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert_refused(run("serve", "--port", str(taken.getsockname()[1])), 1, "cannot listen", "--port")


def test_the_server_ends_with_its_engine(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whoever looks after it starts another."""

    def fail(_batcher: Batcher) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Batcher, "step", fail)
    service = Service("tiny")
    load = partial(Engine.load, str(tiny_llama(hidden_act="relu")))
    with pytest.raises(ZeroDivisionError):
        serve(service, make_app(service), bound("127.0.0.1", 0), drain_s=1, load=load, say=print)


@pytest.mark.parametrize("raises", [True, False])
def test_the_server_ends_with_its_listener(
    raises: bool, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end(_server: uvicorn.Server, *_: Any, **__: Any) -> None:
        if raises:
            raise OSError("no network")

    monkeypatch.setattr(uvicorn.Server, "startup" if raises else "main_loop", end)
    service = Service("tiny")
    load = partial(Engine.load, str(tiny_llama(hidden_act="relu")))
    with pytest.raises(WarmfrontError, match="no network" if raises else "no reason"):
        serve(service, make_app(service), bound("127.0.0.1", 0), drain_s=1, load=load, say=print)


def test_too_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST", 2)
    listener = bound("127.0.0.1", 0)
    address = listener.getsockname()
    server = HttpServer(make_app(Service("tiny")), listener, 1, 30)

    def health(connection: socket.socket) -> bytes:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b"}"):
            found += connection.recv(65536)
        return found

    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(5)]
            with suppress(ConnectionResetError):
                assert opened[4].recv(1) == b""
            assert b'"loading"' in health(opened[0])
            assert b"too_many_connections" in health(opened[2])
            assert opened[2].recv(1) == b""

        def room() -> bool:
            with socket.create_connection(address, 10) as connection:
                return b'"loading"' in health(connection)

        eventually(room)
    finally:
        server.stop(at_once=True)
        server.join()
        listener.close()


def test_what_is_under_way_ends_before_the_server(smollm2: Path) -> None:
    """After SIGTERM: no new connection, the stream to its end, exit code 0."""
    with serving(smollm2) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        stream = iter(
            client.completions.create(
                model="default", prompt="On", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
        )
        next(stream)
        server.process.terminate()

        def refused() -> bool:
            try:
                return server.ask("/health").status == 503
            except OSError:
                return True

        eventually(refused)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        eventually(lambda: server.process.poll() is not None)
        assert server.process.poll() == 0
