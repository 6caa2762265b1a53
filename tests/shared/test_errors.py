"""Messages of errors.  pytest tests/shared/test_errors.py"""

from warmfront.shared.errors import ModelError, WarmfrontError


def test_a_message_is_one_line_that_a_terminal_can_show() -> None:
    assert str(ModelError("a model: é 日本 🙂")) == "a model: é 日本 🙂"
    assert str(ModelError("tensor a\nb\r\x1b[31m\x00\ud800\u202e is unknown")) == "tensor a?b??[31m??? is unknown"
    assert str(WarmfrontError()) == ""


def test_a_long_message_keeps_its_begin_and_its_advice() -> None:
    text = str(ModelError(f"/model: tensor {'x' * 10**6} is unknown; fetch it again"))
    assert len(text) < 2100
    assert text.startswith("/model: tensor xxx")
    assert text.endswith("xxx is unknown; fetch it again")
