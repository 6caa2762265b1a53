"""Text to token ids and back, as the packed model describes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from warmfront.coordinator.tokenizer_json import load_tokenizer, told_in_one_line
from warmfront.shared.errors import ModelError, UsageError
from warmfront.shared.store import PackedModel

__all__ = ["TextStream", "Tokenizer"]


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
        """Token ids of `text`, after the beginning-of-text token if the model wants one."""
        if self._fast is None:
            raise ModelError(f"{self._name} came without a tokenizer.json: give the prompt as --prompt-ids 1,2,3")
        try:
            text.encode()
        except UnicodeEncodeError:  # a command line keeps bytes that are no text
            raise UsageError("the prompt is not UTF-8: give it in that encoding") from None
        with told_in_one_line(f"the tokenizer of {self._name} fails on the text", "shorten it, or give --prompt-ids"):
            ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        bos = self._text.get("bos_id")
        if with_start and self._text.get("add_bos") and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return "" if self._fast is None else str(self._fast.decode(list(ids)))

    def stream(self) -> "TextStream":
        """A decoder that takes one token at a time."""
        return TextStream(self._fast)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for the next answer to `messages` (role, content), by the model's own chat template."""
        template = self._text.get("chat_template")
        if not template:
            raise UsageError(f"{self._name} has no chat template: use `warmfront generate`")
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(template).render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._special("bos_id"),
                eos_token=self._special("eos_id"),
            )
        except Exception as error:  # a template is code, and fails as code does
            raise ModelError(f"the chat template of {self._name} fails: {error}") from error

    def _special(self, role: str) -> str:
        """The text of the token with that role, "" without one."""
        token = self._text.get(role)
        return "" if self._fast is None or token is None else self._fast.id_to_token(token) or ""


class TextStream:
    """Text of a growing answer; a character that spans tokens comes out whole."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self._stream = DecodeStream(skip_special_tokens=True) if fast is not None else None

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        if self._stream is None:
            return ""
        return self._stream.step(self._fast, token) or ""
