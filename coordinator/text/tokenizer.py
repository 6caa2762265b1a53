"""Text to token ids and back, as the packed model describes it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from warmfront.coordinator.models.tokenizer_json import load_tokenizer, one_line_errors
from warmfront.coordinator.text.chat_template import render
from warmfront.coordinator.text.stream import TextStream
from warmfront.shared.errors import ModelError, UsageError
from warmfront.shared.model.store import PackedModel

__all__ = ["Tokenizer"]

# A noncharacter of Unicode, which no text contains.
_MARK = "\ufdd0"


class Tokenizer:
    """The tokenizer of one model. Without a tokenizer.json only token ids go in, and no text comes out."""

    def __init__(self, model: PackedModel) -> None:
        self._name = model.spec.name
        self._text: dict[str, Any] = model.text
        self._fast: Any = None
        if "tokenizer" in model.entries:
            self._fast = load_tokenizer(model.bytes_of("tokenizer").tobytes().decode())

    @property
    def present(self) -> bool:
        """Whether text can be encoded."""
        return self._fast is not None

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self._text.get("eos_ids", ()))

    def encode(self, text: str, *, with_start: bool = True) -> list[int]:
        """Token ids of `text`, after the beginning-of-text token if the model has one and `with_start`."""
        if self._fast is None:
            raise ModelError(f"{self._name} came without a tokenizer.json: give the prompt as --prompt-ids 1,2,3")
        try:  # Python keeps bytes of the command line that are not text in its locale as surrogates
            text = text.encode(errors="surrogateescape").decode()
        except UnicodeError:
            raise UsageError("the prompt is not UTF-8: give it in that encoding") from None
        with one_line_errors(f"the tokenizer of {self._name} fails on the text", "shorten it, or give --prompt-ids"):
            ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        bos = self._text.get("bos_id")
        if with_start and self._text.get("add_bos") and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return "" if self._fast is None else str(self._fast.decode(list(ids)))

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder of the answer to `prompt` that takes one token at a time."""
        return TextStream(self._fast, prompt)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for the next answer to `messages` (role, content), by the model's own chat template."""
        template = self._text.get("chat_template")
        if not template:
            raise UsageError(f"{self._name} has no chat template: use `warmfront generate`")
        tokens = {f"{role}_token": self._text_of(f"{role}_id") for role in ("bos", "eos", "unk", "pad")}
        return render(self._name, template, messages, {name: text for name, text in tokens.items() if text is not None})

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of that prompt, in which a control token that a user or system prompt spells out is plain text.

        Such a token is cut in two by a mark, which the template copies, and the parts are encoded separately.
        """
        control = self._control_tokens()
        plain = [{**message, "content": message["content"].replace(_MARK, "")} for message in messages]
        marked = [
            message if message["role"] == "assistant" else {**message, "content": _cut(message["content"], control)}
            for message in plain
        ]
        rendered = self.render_chat(marked)
        if marked != plain and rendered.replace(_MARK, "") != self.render_chat(plain):
            raise UsageError("the text spells out a control token of the model, which its chat template cannot take")
        first, *others = rendered.split(_MARK)
        ids = self.encode(first)
        for part in others:
            ids += self.encode(part, with_start=False)
        return ids

    def _control_tokens(self) -> list[str]:
        """Texts of the tokens that mean something other than what they spell, the longest first."""
        if self._fast is None:
            return []
        texts = {token.content for token in self._fast.get_added_tokens_decoder().values() if token.special}
        texts |= {self._fast.id_to_token(token) or "" for token in self.end_ids}
        return sorted((text for text in texts if len(text) > 1), key=len, reverse=True)

    def _text_of(self, role: str) -> str | None:
        """The text of the token with this role, such as bos_id; None without it."""
        token = self._text.get(role)
        return None if self._fast is None or token is None else self._fast.id_to_token(token)


def _cut(text: str, tokens: Iterable[str]) -> str:
    """`text` with the mark after the first letter of each occurrence of `tokens`."""
    for token in tokens:
        text = text.replace(token, token[0] + _MARK + token[1:])
    return text
