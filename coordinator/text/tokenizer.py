"""Text to token ids and back, as the packed model describes it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from warmfront.coordinator.models.tokenizer_json import one_line_errors
from warmfront.coordinator.text.chat_template import CHATML, DIALOGUE, DIALOGUE_END, render
from warmfront.coordinator.text.merging import MergingTokenizer
from warmfront.coordinator.text.stream import TextStream, token_speller
from warmfront.shared.errors import UsageError
from warmfront.shared.model.store import PackedModel

__all__ = ["Tokenizer"]

# A noncharacter of Unicode, which no text contains.
_MARK = "\ufdd0"
# ChatML's.
TURN_END = "<|im_end|>"
# What a message of the model has of its own: its text, and its reasoning as templates call that.
_WRITTEN = ("content", "reasoning_content", "thinking")
# JSON schemas of functions that the model may call, or documents to answer from, as templates take them.
Tools = Sequence[Mapping[str, Any]] | None


class Tokenizer:
    """The tokenizer of one model. Without a tokenizer.json only token ids go in, and no text comes out.

    `chat_template`: one that the user gives instead of the model's.
    """

    def __init__(self, model: PackedModel) -> None:
        self._name = model.spec.name
        self._text: dict[str, Any] = model.text
        self.chat_template: str | None = None
        self._fast: MergingTokenizer | None = None
        if "tokenizer" in model.entries:
            self._fast = MergingTokenizer(model.bytes_of("tokenizer"))

    @property
    def present(self) -> bool:
        """Whether text can be encoded."""
        return self._fast is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model came with a chat template; otherwise ChatML is used, or a dialogue as people write it."""
        return bool(self._text.get("chat_templates"))

    @property
    def knows_turns(self) -> bool:
        """Whether the vocabulary has ChatML's end of a turn."""
        return self._fast is not None and len(self._fast.encode(TURN_END)) == 1

    @property
    def chat_stops(self) -> tuple[str, ...]:
        """Texts that end an answer in a chat, where no token does."""
        given = self.chat_template is not None or self.has_chat_template
        return () if given or self.knows_turns else (DIALOGUE_END,)

    @property
    def note(self) -> str | None:
        """What the user should know of this tokenizer at every start."""
        return self._text.get("note")

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self._text.get("eos_ids", ()))

    def encode(self, text: str, *, with_start: bool = True) -> list[int]:
        """Token ids of `text`, after the beginning-of-text token if the model has one and `with_start`."""
        if self._fast is None:
            raise UsageError(
                f"{self._name} came without a tokenizer.json: there is no way to read text with it; "
                "warmfront generate --prompt-ids 1,2 takes token ids"
            )
        try:  # Python keeps bytes of the command line that are not text in its locale as surrogates
            text = text.encode(errors="surrogateescape").decode()
        except UnicodeError:
            raise UsageError("the prompt is not UTF-8: give it in that encoding") from None
        with one_line_errors(f"the tokenizer of {self._name} fails on the text", "shorten it, or give --prompt-ids"):
            ids: list[int] = self._fast.encode(text)
        bos = self._text.get("bos_id")
        if with_start and self._text.get("add_bos") and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return "" if self._fast is None else self._fast.decode(ids)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to an answer's bytes, perhaps a part of a character; nothing if it is special."""
        return b"" if self._fast is None else self._spellings(token)

    def ids_of(self, texts: Iterable[str]) -> dict[int, str]:
        """Those of `texts` that are added tokens, special or not, by their ids."""
        wanted = set(texts)
        return {token: text for token, text in self._added.items() if text in wanted}

    @cached_property
    def _added(self) -> dict[int, str]:
        added = {} if self._fast is None else self._fast.get_added_tokens_decoder()
        return {token: entry.content for token, entry in added.items()}

    @cached_property
    def _spellings(self) -> Callable[[int], bytes]:
        return token_speller(self._fast)

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder of the answer to `prompt` that takes one token at a time."""
        return TextStream(self._fast, prompt)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Tools = None, documents: Tools = None) -> str:
        """The prompt for the next answer to `messages` (role, content).

        `tools` and `documents` are given to the template; the model's template for tools is taken where it has one.
        Raises ModelError for a template that fails, UsageError where none is the default.
        """
        tokens = self._text.get("special_tokens", {})
        return render(self._name, self._template(tools is not None), messages, tokens, tools, documents)

    def _template(self, with_tools: bool) -> str:
        if self.chat_template is not None:
            return self.chat_template
        templates: dict[str, str] = self._text.get("chat_templates", {})
        if with_tools and "tool_use" in templates:
            return templates["tool_use"]
        if templates and "default" not in templates:
            raise UsageError(
                f"the chat templates of {self._name} are {', '.join(templates)}, none is the default: choose one with "
                "--chat-template FILE"
            )
        return templates.get("default", CHATML if self.knows_turns else DIALOGUE)

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Tools = None, documents: Tools = None
    ) -> list[int]:
        """Token ids of that prompt, in which a control token that anyone but the model spells out is plain text: in
        messages, in what describes tools and documents, and in the arguments of calls.

        Such a token is cut in two by a mark, which the template copies, and the parts are encoded separately.
        """
        control = self._control_tokens()
        plain = _changed([messages, tools, documents], lambda text: text.replace(_MARK, ""))
        marked = _changed(plain, lambda text: _cut(text, control))
        for message, whole in zip(marked[0], plain[0], strict=True):
            if whole.get("role") == "assistant":
                message |= {name: whole[name] for name in _WRITTEN if name in whole}
        rendered = self.render_chat(*marked)
        if marked != plain and rendered.replace(_MARK, "") != self.render_chat(*plain):
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


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a value of JSON with every text of it changed, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(name, change): _changed(each, change) for name, each in value.items()}
    return [_changed(each, change) for each in value] if isinstance(value, list | tuple) else value


def _cut(text: str, tokens: Iterable[str]) -> str:
    """`text` with the mark after the first letter of each occurrence of `tokens`."""
    for token in tokens:
        text = text.replace(token, token[0] + _MARK + token[1:])
    return text
