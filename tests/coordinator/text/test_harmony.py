"""The channels of gpt-oss, however the text is cut into pieces.  pytest tests/coordinator/text/test_harmony.py"""

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from warmfront.coordinator.text.harmony import ANSWER, MARKS, Harmony, Part

CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
WEATHER = Part('{"city": "Paris"}', False, "functions.get_weather")
# Answers to a prompt that ends with <|start|>assistant, and what they are.
TRANSCRIPTS = {
    "as documented": (
        '<|channel|>analysis<|message|>User asks: "2 + 2?"<|end|>'
        "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>",
        [Part('User asks: "2 + 2?"', True), Part("2 + 2 = 4.", False)],
    ),
    "a call": (
        f"<|channel|>analysis<|message|>Look.<|end|><|start|>assistant{CALL}",
        [Part("Look.", True), WEATHER],
    ),
    "a plan, then a call": (
        f"<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant{CALL}",
        [Part("I will look.", False), WEATHER],
    ),
    "two calls": (
        f"{CALL.replace('<|call|>', '<|end|>')}<|start|>assistant{CALL.replace('weather', 'time')}",
        [WEATHER, WEATHER._replace(recipient="functions.get_time")],
    ),
    "a recipient in front of the channel": (
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        [WEATHER],
    ),
    "no space in front of the type": (CALL.replace(" <|constrain|>", "<|constrain|>"), [WEATHER]),
    "a tool in the analysis": (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        [Part("print(1)", True, "python")],
    ),
    "two thoughts": (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>",
        [Part("a\nb", True)],
    ),
    "no end of a message": (
        "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b<|channel|>final<|message|>c",
        [Part("a", True), Part("b\nc", False)],
    ),
    "an answer of a type": ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", [Part("{}", False)]),
    "no channel": ("<|message|>a", [Part("a", False)]),
    "cut off in a message": ("<|channel|>analysis<|message|>Wh", [Part("Wh", True)]),
    "cut off in a call": (CALL.removesuffix(' "Paris"}<|call|>'), [WEATHER._replace(text='{"city":')]),
    "cut off in a head": ("<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>fin", [Part("a", False)]),
    "another form": ("Plain text, to=functions.get_weather.", [Part("Plain text, to=functions.get_weather.", False)]),
    "a recipient alone": (" to=me", [Part(" to=me", False)]),
    "a long head": (
        f"<|channel|>commentary to=functions.{'x' * 5000}<|message|>{{}}<|call|>",
        [Part("{}", False, f"functions.{'x' * 5000}")],
    ),
    "nothing": ("", []),
}


def divided(text: str, cuts: set[int]) -> list[Part]:
    """The parts of an answer that is cut at these letters and around its marks; neighbours of one kind joined."""
    parts: list[Part] = []
    for part in pieces(text, cuts):
        if parts and not part.recipient and parts[-1][1:] == part[1:]:
            parts[-1] = part._replace(text=parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts


def pieces(text: str, cuts: set[int]) -> Iterator[Part]:
    harmony, at = Harmony(), 0
    for mark in re.finditer("|".join(map(re.escape, MARKS)), text):
        ends = sorted({at, mark.start(), *(cut for cut in cuts if at < cut < mark.start())})
        for begin, end in pairwise(ends):
            yield from harmony.push(text[begin:end])
        yield from harmony.push("", mark[0])
        at = mark.end()
    for begin, end in pairwise(sorted({at, len(text), *(cut for cut in cuts if at < cut < len(text))})):
        yield from harmony.push(text[begin:end])
    yield from harmony.rest()


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_each_part_is_known_wherever_the_text_is_cut(name: str) -> None:
    text, parts = TRANSCRIPTS[name]
    assert divided(text, set()) == parts
    assert divided(text, set(range(len(text)))) == parts
    for cut in range(min(len(text), 500)):
        assert divided(text, {cut}) == parts


def test_a_text_before_its_mark_comes_with_it() -> None:
    """As the last letters of a message do that might have become a stop string."""
    harmony = Harmony()
    assert list(harmony.push("", "<|channel|>")) == []
    assert list(harmony.push("final", "<|message|>")) == []
    assert list(harmony.push("ab", "<|end|>")) == [Part("ab", False)]
    assert list(harmony.rest()) == []


def test_marks_that_are_spelled_out_are_text() -> None:
    harmony = Harmony()
    assert [*harmony.push("", "<|channel|>"), *harmony.push("final", "<|message|>")] == []
    assert list(harmony.push(CALL)) == [Part(CALL, False)]


@pytest.mark.parametrize(
    ("head", "is_answer"),
    [
        ("<|channel|>final<|message|>", True),
        ("<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>", True),
        ("<|channel|>analysis<|message|>", False),
        ("<|channel|>commentary<|message|>final<|message|>", False),
        ("final<|message|>", False),
    ],
)
def test_where_the_answer_begins(head: str, is_answer: bool) -> None:
    assert bool(ANSWER.search(head)) == is_answer
