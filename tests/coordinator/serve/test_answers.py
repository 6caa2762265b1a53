"""Answers whose marks are special tokens, as messages with calls and reasoning.

pytest tests/coordinator/serve/test_answers.py
"""

import asyncio
import json
import re
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

pytest.importorskip("pydantic")
from warmfront.coordinator.engine.stats import Stats, Token
from warmfront.coordinator.serve.answers import Choice, Piece
from warmfront.coordinator.serve.metrics import Metrics
from warmfront.coordinator.serve.tools import MARKS, CallParser
from warmfront.coordinator.text import harmony
from warmfront.coordinator.text.parts import Parts

LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
WEATHER = ("get_weather", {"city": "Paris"})
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
DEEPSEEK = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


class Letters:
    """A vocabulary of letters and of marks, which are special or not."""

    def __init__(self, special: bool) -> None:
        self.marks = sorted({*harmony.MARKS, *MARKS})
        self.fast = Tokenizer(models.WordLevel({text: i for i, text in enumerate([*LETTERS, *self.marks])}, LETTERS[0]))
        self.special = special
        self.fast.add_tokens([AddedToken(mark, special=special) for mark in self.marks])

    def ids(self, text: str) -> list[int]:
        """A token for each mark and for each letter."""
        parts = re.findall("|".join(map(re.escape, self.marks)) + "|.", text, re.DOTALL)
        return [self.fast.token_to_id(part) for part in parts]

    def ids_of(self, texts: Any) -> dict[int, str]:
        return {self.fast.token_to_id(text): text for text in texts if text in self.marks}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.text(token) for token in ids)

    def text(self, token: int) -> str:
        text: str = self.fast.id_to_token(token)
        return "" if self.special and text in self.marks else text


class Written:
    """An answer that is there."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens, self.stats = iter(tokens), Stats(finish_reason="stop")

    def __aiter__(self) -> "Written":
        return self

    async def __anext__(self) -> Token:
        for token in self._tokens:
            return token
        raise StopAsyncIteration

    async def aclose(self) -> None:
        pass


def answer(text: str, *, special: bool, prompt: str = "", tools: bool = True) -> tuple[Any, Piece]:
    """How it ends and what it is, all pieces together."""
    letters = Letters(special)
    tokens: Any = Written([Token(token, letters.text(token)) for token in letters.ids(text)])
    tokenizer: Any = letters
    parts = Parts(tokenizer, letters.ids(prompt), MARKS if tools else ())
    choice = Choice(0, tokens, Metrics(), parts, CallParser({"get_weather"}) if tools else None)

    async def read() -> Piece:
        whole = Piece()
        async for piece in choice.pieces():
            whole.text += piece.text
            whole.reasoning += piece.reasoning
            whole.calls += piece.calls
        return whole

    whole = asyncio.run(read())
    return choice.finish_reason, whole


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("<|start|>assistant", f"<|channel|>analysis<|message|>Look.<|end|><|start|>assistant{CALL}", "Look.", ""),
        ("<|start|>assistant", f"<|channel|>commentary<|message|>So:<|end|><|start|>assistant{CALL}", "", "So:"),
        ("<|start|>assistant", CALL.replace("commentary", "analysis"), "", ""),
        ("<think>\n", f"Look.\n</think>\n\nSo: {DEEPSEEK}", "Look.\n", "\n\nSo: "),
        ("", DEEPSEEK, "", ""),
        ("", 'So: [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", "So: "),
    ],
)
def test_calls_behind_marks(special: bool, prompt: str, text: str, reasoning: str, content: str) -> None:
    reason, whole = answer(text, special=special, prompt=prompt)
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == [WEATHER]
    assert (reason, whole.reasoning, whole.text) == ("tool_calls", reasoning, content)


@pytest.mark.parametrize("special", [True, False])
def test_channels_without_tools(special: bool) -> None:
    """What looks like a call is the text that it has; a final answer may look like a call."""
    text = '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{"name": 1}<|return|>'
    assert answer(text, special=special, prompt="<|start|>assistant", tools=False)[1] == Piece('{"name": 1}', "Hm.")
    assert answer(CALL, special=special, prompt="<|start|>assistant", tools=False)[1] == Piece('{"city": "Paris"}')


def test_what_no_tool_is_asked_is_text_or_reasoning() -> None:
    other = CALL.replace("get_weather", "x" * 3000)
    assert answer(other, special=True, prompt="<|start|>assistant")[1] == Piece('{"city": "Paris"}')
    browse = '<|channel|>analysis to=browser.search<|message|>{"query": "x"}<|call|>'
    assert answer(browse, special=True, prompt="<|start|>assistant")[1] == Piece("", '{"query": "x"}')
    cut = CALL.partition(' "Paris"')[0]
    assert answer(cut, special=True, prompt="<|start|>assistant") == ("stop", Piece('{"city":'))


def test_marks_are_harmony_only_where_a_message_was_opened() -> None:
    """By the prompt of another template they are what special tokens are: nothing."""
    assert answer("<|channel|>a<|message|>b", special=True, prompt="User: ")[1] == Piece("ab")
