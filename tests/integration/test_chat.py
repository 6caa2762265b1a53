"""The chat, through a pipe and on a terminal.  pytest tests/integration/test_chat.py"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from tests.integration.command import WARMFRONT, prepack, run
from tests.integration.terminal import CTRL_C, CTRL_D, Terminal
from warmfront.coordinator.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def talker(compiled: None, tiny_llama: Callable[..., Path]) -> Path:
    """A random model, whose answer depends on every token of the prompt."""
    return prepack(tiny_llama(hidden_act="relu", seed=4))


def answers_of(model: Path, *questions: str, most: int, system: str | None = None) -> tuple[list[str], int]:
    """The answers of the model, turn by turn, without the command; and how many tokens the last prompt added."""
    messages, answers = [{"role": "system", "content": system}] if system else [], []
    with Engine.load(str(model)) as engine:
        for question in questions:
            messages.append({"role": "user", "content": question})
            ids = engine.tokenizer.chat_ids(messages)
            answers.append("".join(token.text for token in engine.generate(ids, max_new_tokens=most)))
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers, engine.stats.prefilled


def test_two_turns_through_a_pipe(talker: Path) -> None:
    questions = ["What is the capital of France?", "And of Italy?"]
    outcome = run("chat", "-m", talker, "--stats", "-n", "12", input="\n".join(["", *questions]))
    assert outcome.code == 0
    rates = [line for line in outcome.err.splitlines() if line.startswith("load ")]
    assert len(rates) == 2
    assert all("decode 12 tokens" in line for line in rates)
    answers, prefilled = answers_of(talker, *questions, most=12)
    assert outcome.out == "".join(f"{answer}\n" for answer in answers)
    assert len(set(answers)) == 2
    assert f"prefill {prefilled} tokens" in rates[1]  # the second turn only
    tokenizer = FastTokenizer.from_file(str(talker / "tokenizer.json"))
    assert prefilled < 2 * len(tokenizer.encode(questions[1]).ids) + 40


def test_an_answer_that_ends_is_remembered(scripted: Callable[..., Path]) -> None:
    """The answer goes into the next prompt, with the end that the template gives it; only new tokens are computed."""
    model = scripted("a", "b", "c", "<|im_end|>")
    outcome = run("chat", "-m", model, "--stats", input="hi\nhi\nhi\n")
    assert (outcome.code, outcome.out) == (0, "abc\n" * 3)
    tokenizer = FastTokenizer.from_file(str(model / "tokenizer.json"))
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    first, later = len(tokenizer.encode(turn).ids), len(tokenizer.encode(f"<|im_end|>\n{turn}").ids)
    prefills = [int(line.split("prefill ")[1].split()[0]) for line in outcome.err.splitlines()]
    assert prefills == [first, later, later]


def test_the_system_prompt_and_stop_strings_count(talker: Path) -> None:
    question = "What is the capital of France?"

    def ask(*args: str) -> str:
        return run("chat", "-m", talker, "-n", "24", *args, input=question).out

    plain = ask()
    assert plain == f"{answers_of(talker, question, most=24)[0][0]}\n"
    with_system = ask("--system", "Answer in French.")
    assert with_system == f"{answers_of(talker, question, most=24, system='Answer in French.')[0][0]}\n"
    assert with_system != plain
    stop = plain[len(plain) // 2 : len(plain) // 2 + 3]
    assert len(stop) == 3
    assert "\n" not in stop
    assert ask("--stop", stop) == plain.partition(stop)[0] + "\n"


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_standard_stream_is_closed(scripted: Callable[..., Path], closed: int) -> None:
    """A closed stdin is taken as empty; without stdout or stderr the answer is given all the same."""
    args = [WARMFRONT, "chat", "-m", os.fspath(scripted("a", "b", "c", "<|im_end|>"))]
    code = f"import os; os.close({closed}); os.execv({WARMFRONT!r}, {args!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input="hi\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "abc\n" if closed == 2 else "", "")


def test_a_reader_that_leaves_early(scripted: Callable[..., Path]) -> None:
    command = [WARMFRONT, "chat", "-m", os.fspath(scripted("a", "b", "c", context=32768)), "--ctx", "32768"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert process.stdout.read(1) == b"a"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(10) == 1


def test_input_that_is_no_text(tiny_llama: Callable[..., Path]) -> None:
    model = prepack(tiny_llama(max_position_embeddings=4096))
    command = [WARMFRONT, "chat", "-m", os.fspath(model)]
    done = subprocess.run(command, input=b"\xff\xfe\nhello\n", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_conversation_that_outgrows_the_context(tiny_llama: Callable[..., Path]) -> None:
    """A line that is too long is refused and forgotten; the chat goes on."""
    lines = ["word " * 40, "hi"]
    outcome = run("chat", "-m", prepack(tiny_llama(hidden_act="relu")), "--ctx", "60", input="\n".join(lines))
    assert outcome.code == 0
    assert outcome.err.startswith("warmfront: the prompt has ")
    assert outcome.err.count("\n") == 1
    assert outcome.out.strip()


def test_keys_on_a_terminal(scripted: Callable[..., Path]) -> None:
    """The model never ends: Ctrl-C stops its answer, or drops the line; the chat goes on."""
    model = scripted("a", "b", "c", context=32768)
    with Terminal([WARMFRONT, "chat", "-m", os.fspath(model), "--ctx", "32768"]) as terminal:
        terminal.read_until("> ")

        terminal.press("first\n")
        terminal.read_until("abcabcabc")
        pressed = time.monotonic()
        terminal.press(CTRL_C)
        terminal.read_until("> ", timeout=5)
        assert time.monotonic() - pressed < 1

        terminal.press("half a line")
        terminal.read_until("half a line")
        time.sleep(0.2)  # readline must be waiting again: a signal just before that is seen with the next key only
        terminal.press(CTRL_C)
        terminal.read_until("> ", timeout=5)

        terminal.press("second\n")
        terminal.read_until("second\r\nabcabc", timeout=20)
        terminal.press(CTRL_C)
        terminal.read_until("> ", timeout=5)

        terminal.press(CTRL_D)
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.text
    assert "warmfront:" not in terminal.text


def test_reasoning_is_dimmed_on_a_terminal(scripted: Callable[..., Path], tmp_path: Path) -> None:
    """Here the template opens it; in a pipe there are no codes."""
    template = tmp_path / "reasoning.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n\n"
    )  # Jinja drops the last line break
    model = scripted("a", *"</think>", "b", "<|im_end|>")
    args = ["chat", "-m", os.fspath(model), "--chat-template", os.fspath(template)]
    assert run(*args, input="hi\n").out == "a</think>b\n"
    with Terminal([WARMFRONT, *args], "xterm") as terminal:
        terminal.read_until("> ")
        terminal.press("hi\n")
        assert "\x1b[2ma\x1b[0m\x1b[2m</think>\x1b[0mb\r\n" in terminal.read_until("b\r\n")
        if "> " not in terminal.text.rpartition("b\r\n")[2]:
            terminal.read_until("> ")
        terminal.press(CTRL_D)
        assert terminal.wait() == 0


def test_a_model_without_a_template_is_asked_as_chatml(scripted: Callable[..., Path], tmp_path: Path) -> None:
    model = scripted("a", "b", "<|im_end|>")
    asked = run("generate", "-m", model, "--chat", "--system", "s", "-p", "hi", "--json")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    prepack(model)
    plain = run("generate", "-m", model, "--chat", "--system", "s", "-p", "hi", "--json")
    said = "has no chat template: it is asked as ChatML; --chat-template FILE gives another\n"
    assert plain.err.endswith(said)
    assert plain.err.count("\n") == 1
    assert json.loads(plain.out)["prompt_ids"] == json.loads(asked.out)["prompt_ids"]
    assert run("chat", "-m", model, input="hi\n").err.endswith(said)
    file = tmp_path / "template"
    file.write_text("{{ messages[0].content }}")
    own = run("generate", "-m", model, "--chat", "--chat-template", file, "-p", "hi", "--json")
    assert own.err == ""
    tokenizer = FastTokenizer.from_file(str(model / "tokenizer.json"))
    assert json.loads(own.out)["prompt_ids"] == tokenizer.encode("hi").ids


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("chat",), "cannot read the chat template from nowhere: No such file or directory"),
        (("generate", "--chat", "-p", "x"), "cannot read the chat template from nowhere: No such file or directory"),
        (("generate", "-p", "x"), "--chat-template is for a chat: pass --chat too"),
    ],
)
def test_templates_that_are_refused(args: tuple[str, ...], message: str) -> None:
    outcome = run(*args, "--chat-template", "nowhere")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"warmfront: {message}\n")


@pytest.mark.slow
def test_ctrl_c_while_loading_ends_the_chat(smollm2: Path) -> None:
    with Terminal([WARMFRONT, "chat", "-m", os.fspath(smollm2)]) as terminal:
        time.sleep(0.8)
        terminal.press(CTRL_C)
        assert terminal.wait(3) == 130
    assert "Traceback" not in terminal.text
    assert "> " not in terminal.text
