"""Reasoning told apart from the answer, piece by piece.  pytest tests/coordinator/text/test_reasoning.py"""

import pytest

from warmfront.coordinator.text.reasoning import Reasoning


def divided(text: str, size: int, prompt: str = "") -> list[tuple[str, bool]]:
    """The parts of a text that comes in pieces of `size` letters; neighbours of one kind joined."""
    reasoning, parts = Reasoning(prompt), list[tuple[str, bool]]()
    shown = [part for at in range(0, len(text), size) for part in reasoning.push(text[at : at + size])]
    for piece, dim in [*shown, reasoning.rest()]:
        if parts and parts[-1][1] == dim:
            parts[-1] = (parts[-1][0] + piece, dim)
        elif piece:
            parts.append((piece, dim))
    return parts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "prompt", "reasoning"),
    [
        ("<think>\nwhy\n</think>\n\nSo.", "", "<think>\nwhy\n</think>"),
        (" \n<think>why</think>", "", " \n<think>why</think>"),
        ("<think>why < not </thin", "", "<think>why < not </thin"),
        ("why</think>So.", "<|assistant|><think>\n", "why</think>"),
        ("<think></think>A<think>b</think>", "", "<think></think>"),
        ("<thin", "", ""),
        ("<thinner>", "<|assistant|>", ""),
        ("A <think>b</think>", "", ""),
        ("", "", ""),
    ],
)
def test_reasoning_is_at_the_beginning(text: str, prompt: str, reasoning: str, size: int) -> None:
    rest = text.removeprefix(reasoning)
    assert divided(text, size, prompt) == [part for part in ((reasoning, True), (rest, False)) if part[0]]


def test_only_what_may_become_a_tag_is_held_back() -> None:
    reasoning = Reasoning("")
    assert list(reasoning.push("<think>a")) == [("<think>a", True)]
    assert list(reasoning.push("b </thi")) == [("b ", True)]
    assert list(reasoning.push("s")) == [("</this", True)]
    assert list(reasoning.push("</think>c")) == [("</think>", True), ("c", False)]
    assert list(reasoning.push("</think>")) == [("</think>", False)]
