"""Where prompts come from and how answers end, with models that say given tokens.

pytest tests/integration/test_generate.py
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tests.integration.command import WARMFRONT, Outcome, assert_refused, prepack, run
from warmfront.coordinator.cli.report import as_text
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.config import Sampling
from warmfront.shared.errors import ModelError, UsageError

pytestmark = pytest.mark.usefixtures("compiled")

END = "<|im_end|>"
# The bytes of 🌊 as byte-level tokens are written.
WAVE = ("ð", "Ł", "Į", "Ĭ")


@pytest.fixture(scope="module")
def plain(compiled: None, tiny_llama: Callable[..., Path]) -> Path:
    return prepack(tiny_llama(hidden_act="relu"))


@pytest.fixture(scope="module")
def engine(plain: Path) -> Iterator[Engine]:
    with Engine.load(str(plain), context=128) as engine:
        yield engine


@pytest.fixture(scope="module")
def abc(compiled: None, scripted: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.load(str(scripted("a", "b", "c", END)), context=16) as engine:
        yield engine


def said(outcome: Outcome) -> dict[str, Any]:
    """The object that a command has printed."""
    assert (outcome.code, outcome.err) == (0, ""), outcome
    found: dict[str, Any] = json.loads(outcome.out)
    return found


class TestEnd:
    """How an answer ends, and that nothing of it is lost."""

    @pytest.mark.parametrize(
        ("options", "text", "reason"),
        [
            ({}, "abc", "stop"),
            ({"max_new_tokens": 2}, "ab", "length"),
            ({"max_new_tokens": 3}, "abc", "length"),
            ({"max_new_tokens": 4}, "abc", "stop"),
            ({"stop": "b"}, "a", "stop"),
            ({"stop": "bc"}, "a", "stop"),
            ({"stop": ["never", "c"]}, "ab", "stop"),
            ({"stop": "cd"}, "abc", "stop"),
            ({"stop": "bc", "max_new_tokens": 2}, "ab", "length"),
            ({"ignore_eos": True, "max_new_tokens": 9}, "abcabca", "length"),
            ({"ignore_eos": True}, "abcabcabca", "length"),  # the context of 16 is full
        ],
    )
    def test_reason(self, abc: Engine, options: dict[str, Any], text: str, reason: str) -> None:
        assert "".join(token.text for token in abc.generate("xyz", **options)) == text
        assert abc.stats.finish_reason == reason

    def test_there_is_no_reason_yet(self, abc: Engine) -> None:
        answer = abc.generate("xyz")
        next(answer)
        assert abc.stats.finish_reason is None

    @pytest.mark.parametrize("end", [(), (END,)])
    def test_half_a_character_is_shown_as_such(self, scripted: Callable[..., Path], end: tuple[str, ...]) -> None:
        with Engine.load(str(scripted("o", "k", *WAVE[:3], *end))) as engine:
            tokens = list(engine.generate("x", max_new_tokens=6 if end else 5))
            assert [token.text for token in tokens] == ["o", "k", "", "", *([""] if end else []), "\ufffd"]
            assert engine.tokenizer.decode([token.id for token in tokens]) == "ok\ufffd"

    def test_what_may_become_a_stop_string_waits_for_its_characters(self, scripted: Callable[..., Path]) -> None:
        with Engine.load(str(scripted("a", *WAVE, "b", END))) as engine:
            assert "".join(token.text for token in engine.generate("x", stop="🌊")) == "a"
            assert "".join(token.text for token in engine.generate("x", stop="🌊!")) == "a🌊b"


class TestRequests:
    """The arguments of `Engine.generate`."""

    @pytest.mark.parametrize("prompt", [[1.5], ["1"], [None], [5, 2.0]])
    def test_ids_are_whole_numbers(self, engine: Engine, prompt: list[Any]) -> None:
        with pytest.raises(UsageError, match=r"^a token id is .+: it must be a whole number$"):
            next(engine.generate(prompt))

    def test_ids_of_numpy(self, engine: Engine) -> None:
        ids = np.array([5, 17], np.int32)
        assert [t.id for t in engine.generate(ids, max_new_tokens=3)] == [
            t.id for t in engine.generate([5, 17], max_new_tokens=3)
        ]

    @pytest.mark.parametrize("most", [0, -1, 1.5, "2", None])
    def test_the_most_tokens_are_a_whole_number(self, engine: Engine, most: Any) -> None:
        with pytest.raises(UsageError, match=r"^max_new_tokens is .+: it must be a whole number, 1 or more$"):
            next(engine.generate([5], max_new_tokens=most))

    @pytest.mark.parametrize("count", [0, 1, 5, 10_000])
    def test_log_probabilities(self, engine: Engine, plain: Path, count: int) -> None:
        """They are of the model's own distribution, whatever is drawn, as transformers computes it in float64."""
        prompt, sampling = [5, 17, 200], Sampling(temperature=2, top_k=40, repetition_penalty=1.5, seed=3)
        tokens = list(engine.generate(prompt, max_new_tokens=8, sampling=sampling, logprobs=count, ignore_eos=True))
        model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float64)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *(token.id for token in tokens)]])).logits[0]
        expected = torch.log_softmax(logits, 1)[len(prompt) - 1 : -1]
        assert len(tokens) == 8
        assert any(token.id != int(row.argmax()) for token, row in zip(tokens, expected, strict=True))
        for token, row in zip(tokens, expected, strict=True):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            values, order = torch.topk(row, min(count, len(row)))
            assert [chance for _, chance in token.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert [number for number, _ in token.top[:5]] == order.tolist()[:5]

    def test_without_log_probabilities(self, engine: Engine) -> None:
        (token,) = engine.generate([5], max_new_tokens=1)
        assert (token.logprob, token.top) == (None, ())

    def test_busy_is_of_the_answer_alone(self, engine: Engine) -> None:
        for count in (100, 2, 40):
            assert len(list(engine.generate([5, 17], max_new_tokens=count, ignore_eos=True))) == count
            assert all(0 < share <= 1 for share in engine.statistics.busy_shares(engine.stats.decode_s).values())
            (line,) = (line for line in as_text(engine).splitlines() if line.startswith("cpu0"))
            assert 0 < int(line.partition("busy ")[2].partition("%")[0]) <= 100

    def test_without_an_answer_no_worker_was_busy(self, abc: Engine) -> None:
        abc.statistics._worked = abc.statistics._worked[:0]  # as loading leaves it
        assert abc.statistics.busy_shares(abc.stats.decode_s) == {"cpu0": 0}

    def test_the_engine_goes_on_after_a_model_that_is_damaged(self, scripted: Callable[..., Path]) -> None:
        folder = scripted("a", "b")
        with Engine.load(str(folder)) as engine:
            answer = engine.generate("x")
            assert next(answer).text == "a"
            engine.session.runtime.logits[0, 3] = np.nan  # where the next token would be picked
            session = engine.session
            step, session.step = session.step, lambda *_: session.runtime.logits[0]  # type: ignore[method-assign]
            with pytest.raises(ModelError, match="logits that are not finite"):
                next(answer)
            session.step = step  # type: ignore[method-assign]
            assert next(engine.generate("x")).text == "a"


class TestPrompt:
    """The ways in which a prompt comes to `generate`."""

    TEXT = "Grüße,\n\tthe sea 🌊 \n"

    def ids(self, plain: Path, text: str) -> list[int]:
        found: list[int] = Tokenizer.from_file(str(plain / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        return found

    @pytest.mark.parametrize("args", [[], ["-p", "-"], ["-f", "-"], ["-f", "FILE"]], ids=str)
    def test_its_ways(self, plain: Path, tmp_path: Path, args: list[str]) -> None:
        """Every byte belongs to it, the last line feed too."""
        (tmp_path / "FILE").write_text(self.TEXT)
        options = {"input": self.TEXT} if "FILE" not in args else {}
        where = [str(tmp_path / arg) if arg == "FILE" else arg for arg in args]
        found = said(run("generate", "-m", plain, "-n", "1", "--json", *where, **options))
        assert found["prompt_ids"] == self.ids(plain, self.TEXT)

    def test_it_may_be_long(self, plain: Path) -> None:
        text = "a b " * 75_000
        outcome = run("generate", "-m", plain, "--json", input=text)
        assert_refused(outcome, 2, f"the prompt has {len(self.ids(plain, text))} tokens")

    @pytest.mark.parametrize(
        ("args", "given", "words"),
        [
            ([], b"", ["there is no prompt", "-f FILE", "pipe"]),
            (["-p", "-"], b"", ["there is no prompt"]),
            (["-f", "-"], b"a\xff", ["stdin is not UTF-8"]),
            (["-f", "broken"], b"", ["broken is not UTF-8"]),
            (["-f", "absent"], b"", ["absent", "No such file"]),
            (["-f", "."], b"", ["Is a directory"]),
            (["-f", "/dev/zero"], b"", ["/dev/zero is larger than 256 MiB"]),
            (["-f", "broken", "-p", "x"], b"", ["one of them"]),
            (["--chat", "--prompt-ids", "1"], b"", ["--chat", "-p TEXT"]),
            (["--system", "Be brief.", "-p", "x"], b"", ["--system", "--chat"]),
            (["--logprobs", "3", "-p", "x"], b"", ["--logprobs", "--json"]),
        ],
    )
    def test_wrong_ones(self, tmp_path: Path, args: list[str], given: bytes, words: list[str]) -> None:
        (tmp_path / "broken").write_bytes(b"\xff\xfea")
        command = [WARMFRONT, "generate", *args]
        done = subprocess.run(command, input=given, capture_output=True, cwd=tmp_path, timeout=60, check=False)
        assert_refused(Outcome(done.returncode, done.stdout.decode(), done.stderr.decode()), 2, *words)

    def test_a_turn_of_a_chat(self, plain: Path) -> None:
        found = said(
            run("generate", "-m", plain, "-n", "1", "--json", "--chat", "--system", "Be", "-p", "é <|im_end|>")
        )
        fast = Tokenizer.from_file(str(plain / "tokenizer.json"))
        assert fast.decode(found["prompt_ids"], skip_special_tokens=False) == (
            "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\né <|im_end|><|im_end|>\n<|im_start|>assistant\n"
        )
        assert found["prompt_ids"].count(2) == 2  # of the template; the user's is text


def test_json_says_the_reason_and_the_log_probabilities(scripted: Callable[..., Path]) -> None:
    model = scripted("a", "b", "c", END)
    found = said(run("generate", "-m", model, "-p", "x", "--json", "--logprobs", "2", "--ignore-eos", "-n", "5"))
    assert (found["text"], found["finish_reason"]) == ("abca", "length")
    assert len(found["logprobs"]) == len(found["token_ids"]) == 5
    for token, entry in zip(found["token_ids"], found["logprobs"], strict=True):
        assert (entry["id"], entry["top"][0]["id"], len(entry["top"])) == (token, token, 2)
        assert entry["logprob"] == entry["top"][0]["logprob"] > entry["top"][1]["logprob"]
    assert [entry["text"] for entry in found["logprobs"]] == ["a", "b", "c", "", "a"]
    assert "logprobs" not in said(run("generate", "-m", model, "-p", "x", "--json", "-n", "1"))


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "ascii"])
def test_encodings_that_lack_a_character(scripted: Callable[..., Path], encoding: str) -> None:
    command = [WARMFRONT, "generate", "-m", os.fspath(scripted("a", *WAVE, "b", END)), "-p", "x", "--stats"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done
    assert done.stdout.replace("🌊".encode(), b"?") == b"a?b\n"
    assert b"tok/s" in done.stderr
    assert b"Traceback" not in done.stderr
