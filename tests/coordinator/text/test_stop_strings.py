"""Stop strings in streams against a search of the whole text.  pytest tests/coordinator/text/test_stop_strings.py"""

import random
from collections.abc import Sequence

import pytest

from warmfront.coordinator.text.stop_strings import StopText


def shown_until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The part of `text` that may be shown: up to the first stop string, else all that cannot become one."""
    starts = [at for at in range(len(text)) if any(text.startswith(stop, at) for stop in stops)]
    if starts:
        return text[: starts[0]], True
    open_at = [at for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in stops)]
    return text[: min(open_at, default=len(text))], False


def random_case(rng: random.Random) -> tuple[list[str], list[str]]:
    """Pieces of a text and stop strings, of so few letters that partial matches are everywhere."""
    letters = rng.choice(["a", "ab", "abc", "é\n€"])

    def word(shortest: int, longest: int) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(shortest, longest)))

    return [word(0, 4) for _ in range(rng.randint(0, 12))], [word(1, 6) for _ in range(rng.randint(0, 3))]


@pytest.mark.parametrize("seed", range(20))
def test_any_text_in_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    found = held = 0
    for _ in range(300):
        pieces, stops = random_case(rng)
        stream, shown = StopText(stops), ""
        for count in range(1, len(pieces) + 1):
            shown += stream.push(pieces[count - 1])
            text = "".join(pieces[:count])
            assert (shown, stream.found) == shown_until(text, stops), (pieces[:count], stops)
            if stream.found:
                break
        rest = stream.rest()
        if stream.found:
            assert rest == ""
        else:
            assert shown + rest == "".join(pieces)
        found, held = found + stream.found, held + bool(rest)
    assert found > 20
    assert held > 5


def test_a_stop_string_over_many_pieces() -> None:
    stream = StopText(["</end>"])
    assert [stream.push(piece) for piece in ("Hi", "<", "/e", "nd", ">more")] == ["Hi", "", "", "", ""]
    assert stream.found
    assert stream.rest() == ""


def test_a_false_start_is_shown_late() -> None:
    stream = StopText(["###"])
    assert [stream.push(piece) for piece in ("a#", "#", " b")] == ["a", "", "## b"]
    assert not stream.found


def test_the_end_of_the_answer_brings_what_was_held_back() -> None:
    stream = StopText(["###"])
    assert stream.push("a##") == "a"
    assert stream.rest() == "##"
    assert stream.rest() == ""
    assert not stream.found


@pytest.mark.parametrize("stops", [[], [""], ["", ""]])
def test_without_stop_strings_everything_passes(stops: list[str]) -> None:
    stream = StopText(stops)
    assert [stream.push(piece) for piece in ("", "abc", "")] == ["", "abc", ""]
    assert stream.rest() == ""
    assert not stream.found


def test_the_earliest_of_several_in_one_piece() -> None:
    stream = StopText(["stop", "halt"])
    assert stream.push("go, halt, stop") == "go, "
    assert stream.found


def test_a_text_is_one_stop_string() -> None:
    stream = StopText("stop")
    assert [stream.push(piece) for piece in ("to st", "ep", " st", "op")] == ["to ", "step", " ", ""]
    assert stream.found


def test_behind_a_stop_string_nothing_comes() -> None:
    stream = StopText(["."])
    assert stream.push("a.b") == "a"
    assert stream.push("c") == ""
    assert stream.found
