"""What the tokenizers library writes and raises.  pytest tests/coordinator/models/test_tokenizer_json.py"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from warmfront.coordinator.models.tokenizer_json import load_tokenizer, one_line_errors
from warmfront.shared.errors import ModelError, UsageError


def words(**more: Any) -> str:
    """The text of a tokenizer of two words, with fields replaced."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    return json.dumps(
        {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model} | more
    )


def test_nothing_is_cut_or_padded() -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    text = words(truncation=cut, padding=pad | {"pad_to_multiple_of": None})
    assert Tokenizer.from_str(text).encode("b b b b").ids == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert load_tokenizer(text).encode("b b b b").ids == [1, 1, 1, 1]


def test_a_panic_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """An expression that backtracks until the library gives up."""
    tokenizer = load_tokenizer(
        words(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False})
    )

    def encode() -> None:
        with one_line_errors("it fails", "go on"):
            os.write(2, b"lost")
            tokenizer.encode("a" * 40 + "!")

    with pytest.raises(ModelError, match=r"^it fails \(Onig: Regex search error: .*\); go on$"):
        encode()
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_what_is_written_without_a_panic_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    for error in (UsageError("of ours"), KeyboardInterrupt(), None):
        with pytest.raises(type(error)) if error else one_line_errors("", ""), one_line_errors("", ""):
            os.write(2, b"kept")
            if error:
                raise error
        assert capfd.readouterr().err == "kept"


def test_without_stderr(tmp_path: Path) -> None:
    """Nothing can be held back, and nothing else takes the descriptor's place."""
    saved = os.dup(2)
    os.close(2)
    try:
        with one_line_errors("", ""):
            pass
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(2)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
