"""The tokenizer of a Hugging Face folder: tokenizer.json, begin and end tokens, chat template."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.hf.folder import read_fields, read_text
from warmfront.coordinator.models.source import TokenizerFiles, end_ids
from warmfront.coordinator.models.tokenizer_json import load_tokenizer, one_line_errors

__all__ = ["read_tokenizer"]


def read_tokenizer(folder: Path, config: Fields, vocab: int) -> TokenizerFiles | None:
    """The folder's tokenizer; None if it has none. Raises ModelError for damaged files.

    `config`: the fields of config.json. `vocab`: the number of ids.
    """
    settings = read_fields(folder, "tokenizer_config.json") or Fields(folder, {})
    generation = read_fields(folder, "generation_config.json") or Fields(folder, {})
    ends = [*generation.tokens("eos_token_id", vocab), *config.tokens("eos_token_id", vocab)]
    begins = config.tokens("bos_token_id", vocab)
    template = _chat_template(folder, settings)
    text, path = read_text(folder, "tokenizer.json"), folder / "tokenizer.json"
    if text is None:
        return None
    with one_line_errors(f"{path} is not a tokenizer", "fetch it again"):
        tokenizer = load_tokenizer(text)
        if _add_tokens(tokenizer, settings.section("added_tokens_decoder")):
            text = tokenizer.to_str()
        bos_id = _named(tokenizer, settings, "bos_token", vocab, begins)
        add_bos = settings.flag("add_bos_token", tokenizer.encode("").ids[:1] == [bos_id])
        special = [(i, token.content) for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        eos_id = _named(tokenizer, settings, "eos_token", vocab, ends)
    return TokenizerFiles(
        json=text,
        chat_template=template,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=end_ids(special, [*ends, eos_id]),
        add_bos=bos_id is not None and add_bos,
    )


def _add_tokens(tokenizer: Any, added: Fields) -> bool:
    """Add tokens of the settings that tokenizer.json lacks, like transformers; returns whether there were any."""
    there, tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}, []
    for key in sorted(added, key=int):
        entry = added.section(key)
        if entry.text("content") not in there:
            flags = {name: entry.flag(name, False) for name in ("single_word", "lstrip", "rstrip", "special")}
            normalized = entry.flag("normalized", not flags["special"])
            tokens.append(AddedToken(entry.text("content"), **flags, normalized=normalized))
    return bool(tokenizer.add_tokens(tokens))


def _named(tokenizer: Any, settings: Fields, role: str, vocab: int, otherwise: list[int]) -> int | None:
    """Id of a token that the settings give as text or as object with `content`; else the first of `otherwise`."""
    text = settings.section(role).text("content") if settings.holds(role, dict) else settings.text(role, "")
    number: int | None = tokenizer.token_to_id(text) if text else next(iter(otherwise), None)
    if number is not None and number >= vocab:
        raise settings.wrong(role, f"one of the {vocab} tokens that the weights know")
    return number


def _chat_template(folder: Path, settings: Fields) -> str | None:
    """From chat_template.jinja, or from the settings: a text, or of a list the one named "default"."""
    template = read_text(folder, "chat_template.jinja")
    if template is not None:
        return template
    if not settings.holds("chat_template", list):
        return settings.text("chat_template", "") or None
    named = {entry.text("name"): entry.text("template") for entry in settings.sections("chat_template")}
    return named.get("default")
