"""The chat, through a pipe and on a terminal.  pytest tests/integration/test_chat.py"""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.command import WARMFRONT, prepack, run
from tests.integration.terminal import CTRL_C, CTRL_D, Terminal
from warmfront.coordinator.engine import Engine

pytestmark = pytest.mark.usefixtures("compiled")

ENDLESS = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,"  # the model goes on to several hundred


@pytest.mark.slow
def test_two_turns_through_a_pipe(smollm2: Path) -> None:
    questions = ["What is the capital of France?", "And of Italy?"]
    outcome = run("chat", "-m", smollm2, "--stats", stdin=None, input="\n".join(["", *questions]))
    assert outcome.code == 0
    rates = [line for line in outcome.err.splitlines() if line.startswith("load ")]
    assert len(rates) == 2
    messages, answers = [], []
    with Engine.load(str(smollm2)) as engine:
        for question in questions:
            messages.append({"role": "user", "content": question})
            prompt = engine.tokenizer.render_chat(messages)
            answers.append("".join(token.text for token in engine.generate(prompt, max_new_tokens=engine.context)))
            messages.append({"role": "assistant", "content": answers[-1]})
    assert outcome.out == "".join(f"{answer}\n" for answer in answers)
    assert "Paris" in answers[0]
    assert f"prefill {engine.stats.prefilled} tokens" in rates[1]  # the second turn only


@pytest.mark.slow
def test_the_system_prompt_and_stop_strings_count(smollm2: Path) -> None:
    def ask(*args: str) -> str:
        return run("chat", "-m", smollm2, "--ctx", "80", *args, stdin=None, input="What is the capital of France?").out

    plain = ask()
    assert "Paris" in plain
    assert ask("--system", "Answer in French.") not in ("", plain)
    assert ask("--stop", "Paris") == plain.partition("Paris")[0] + "\n"


def test_input_that_is_no_text(tiny_llama: Callable[..., Path]) -> None:
    model = prepack(tiny_llama(max_position_embeddings=4096))
    command = [WARMFRONT, "chat", "-m", os.fspath(model)]
    done = subprocess.run(command, input=b"\xff\xfe\nhello\n", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_conversation_that_outgrows_the_context(tiny_llama: Callable[..., Path]) -> None:
    """Too long a line is refused and forgotten; the chat goes on."""
    lines = ["word " * 40, "hi"]
    outcome = run(
        "chat", "-m", prepack(tiny_llama(hidden_act="relu")), "--ctx", "60", stdin=None, input="\n".join(lines)
    )
    assert outcome.code == 0
    assert outcome.err.startswith("warmfront: the prompt has ")
    assert outcome.err.count("\n") == 1
    assert outcome.out.strip()


@pytest.mark.slow
def test_keys_on_a_terminal(smollm2: Path) -> None:
    with Terminal([WARMFRONT, "chat", "-m", os.fspath(smollm2)]) as terminal:
        terminal.read_until("> ")

        terminal.press(f"{ENDLESS}\n")
        terminal.read_until("21, 22, 23,")
        pressed = time.monotonic()
        terminal.press(CTRL_C)
        rest = terminal.read_until("> ", timeout=5)
        assert time.monotonic() - pressed < 1
        assert "100," not in rest

        terminal.press("half a line")
        terminal.read_until("half a line")
        time.sleep(0.2)  # readline must be waiting again: a signal just before that is seen with the next key only
        terminal.press(CTRL_C)
        terminal.read_until("> ", timeout=5)

        terminal.press("What is the capital of France?\n")
        assert "Paris" in terminal.read_until("> ", timeout=20)

        terminal.press(CTRL_D)
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.text
    assert "warmfront:" not in terminal.text


@pytest.mark.slow
def test_ctrl_c_while_loading_ends_the_chat(smollm2: Path) -> None:
    with Terminal([WARMFRONT, "chat", "-m", os.fspath(smollm2)]) as terminal:
        time.sleep(0.8)
        terminal.press(CTRL_C)
        assert terminal.wait(3) == 130
    assert "Traceback" not in terminal.text
    assert "> " not in terminal.text
