"""The tokenizer of a Hugging Face folder: tokenizer.json, the tokens that other files add, end tokens, chat templates.

As transformers does it: the tokens of tokenizer.json get what `added_tokens_decoder` of tokenizer_config.json adds or
says otherwise; folders from before that was written have special_tokens_map.json and added_tokens.json in its place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.hf.folder import read_fields, read_text
from warmfront.coordinator.models.source import TokenizerFiles, end_ids
from warmfront.coordinator.models.tokenizer_json import load_tokenizer, one_line_errors

__all__ = ["read_tokenizer"]

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip")


def read_tokenizer(folder: Path, config: Fields, vocab: int) -> TokenizerFiles | None:
    """The folder's tokenizer; None if it has none. Raises ModelError for damaged files.

    `config`: the fields of config.json. `vocab`: the number of ids.
    """
    settings = read_fields(folder, "tokenizer_config.json") or Fields(folder, {})
    generation = read_fields(folder, "generation_config.json") or Fields(folder, {})
    ends = [*generation.tokens("eos_token_id", vocab), *config.tokens("eos_token_id", vocab)]
    begins = config.tokens("bos_token_id", vocab)
    templates = _chat_templates(folder, settings)
    text, path = read_text(folder, "tokenizer.json"), folder / "tokenizer.json"
    if text is None:
        return None
    with one_line_errors(f"{path} is not a tokenizer", "fetch it again"):
        tokenizer = load_tokenizer(text)
        named = settings
        if "added_tokens_decoder" in settings:
            decoder = settings.section("added_tokens_decoder")
            entries = [decoder.section(key) for key in sorted(decoder, key=int)]
            added = [_added(entry, entry.flag("special", False)) for entry in entries]
        else:
            named = settings.updated(read_fields(folder, "special_tokens_map.json"))
            added = list(_legacy(read_fields(folder, "added_tokens.json"), named))
        if _add_tokens(tokenizer, added, named, vocab):
            text = tokenizer.to_str()
        ids = {role: _id_of(tokenizer, named, role, vocab) for role in ROLES}
        ids["bos_token"] = next(iter(begins), None) if ids["bos_token"] is None else ids["bos_token"]
        ids["eos_token"] = next(iter(ends), None) if ids["eos_token"] is None else ids["eos_token"]
        add_bos = settings.flag("add_bos_token", tokenizer.encode("").ids[:1] == [ids["bos_token"]])
        tokens = [(number, token.content) for number, token in tokenizer.get_added_tokens_decoder().items()]
        texts = {role: None if number is None else tokenizer.id_to_token(number) for role, number in ids.items()}
    return TokenizerFiles(
        json=text,
        chat_templates=templates,
        special_tokens={role: text for role, text in texts.items() if text is not None},
        bos_id=ids["bos_token"],
        eos_ids=end_ids(tokens, [*ends, ids["eos_token"]]),
        add_bos=ids["bos_token"] is not None and add_bos,
    )


def _added(entry: Fields, special: bool) -> Any:
    """A token with its flags."""
    flags = {name: entry.flag(name, False) for name in FLAGS}
    normalized = entry.flag("normalized", not special)
    return AddedToken(entry.text("content"), **flags, normalized=normalized, special=special)


def _legacy(added: Fields | None, named: Fields) -> Iterator[Any]:
    """The tokens of added_tokens.json, ids by text, in the order of the ids; those that have a name are special."""
    if added is not None:
        special = {token.content for token in _named_tokens(named)}
        for text in sorted(added, key=lambda text: added.count(text, low=0)):
            yield AddedToken(text, normalized=text not in special, special=text in special)


def _named_tokens(named: Fields) -> Iterator[Any]:
    """The tokens that the settings name, by their roles or in a list of more."""
    for role in ROLES:
        if named.holds(role, dict):
            yield _added(named.section(role), special=True)
        elif named.text(role, ""):
            yield AddedToken(named.text(role), special=True)
    # The second is the older name.
    for item in named.items("extra_special_tokens") or named.items("additional_special_tokens"):
        yield AddedToken(item, special=True) if isinstance(item, str) else _added(item, special=True)


def _add_tokens(tokenizer: Any, added: list[Any], named: Fields, vocab: int) -> bool:
    """Add what tokenizer.json lacks or has with other flags; returns whether there was anything.

    A token that is only named is not added where the weights have no row for it.
    """
    there = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    new = [token for token in added if repr(there.get(token.content)) != repr(token)]
    tokenizer.add_tokens(new)
    known = there.keys() | {token.content for token in new}
    for token in _named_tokens(named):
        room = tokenizer.get_vocab_size() < vocab or tokenizer.token_to_id(token.content) is not None
        if token.content not in known and token.content and room:
            tokenizer.add_tokens([token])
            new.append(token)
            known.add(token.content)
    return bool(new)


def _id_of(tokenizer: Any, named: Fields, role: str, vocab: int) -> int | None:
    """Id of a token that the settings give as text or as object with `content`."""
    text = named.section(role).text("content") if named.holds(role, dict) else named.text(role, "")
    number: int | None = tokenizer.token_to_id(text) if text else None
    if number is not None and number >= vocab:
        raise named.wrong(role, f"one of the {vocab} tokens that the weights know")
    return number


def _chat_templates(folder: Path, settings: Fields) -> dict[str, str]:
    """By name: that of chat_template.jinja, or those of the settings, one text or a list of named ones."""
    template = read_text(folder, "chat_template.jinja")
    if template is None and settings.holds("chat_template", list):
        return {entry.text("name"): entry.text("template") for entry in settings.sections("chat_template")}
    template = settings.text("chat_template", "") if template is None else template
    return {"default": template} if template else {}
