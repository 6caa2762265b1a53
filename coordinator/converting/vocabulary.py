"""A tokenizer.json as the fields of a GGUF file; the way back of `models/gguf/tokenizer.py`.

Byte-level vocabularies only: a SentencePiece one needs scores, which a tokenizer.json does not have.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from warmfront.coordinator.models.gguf.pre_tokenizers import GPT2, PRE
from warmfront.coordinator.models.gguf.tokenizer import CONTROL, NORMAL, ROLES, USER_DEFINED
from warmfront.coordinator.models.source import TokenizerFiles
from warmfront.shared.errors import ModelError

__all__ = ["vocabulary_fields"]

_UNUSED = 5


def vocabulary_fields(tokenizer: TokenizerFiles, vocab: int, name: str) -> dict[str, Any]:
    """The fields under `tokenizer.` of a model called `name` with `vocab` ids; raises ModelError for another kind."""
    read = json.loads(tokenizer.json)
    model, added = read["model"], read.get("added_tokens") or []
    steps = [*_steps(read.get("pre_tokenizer") or {})]
    if model.get("type") != "BPE" or not any(step["type"] == "ByteLevel" for step in steps):
        raise ModelError(f"{name} has no byte-level vocabulary; only those can be written as GGUF")
    tokens = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    ids = {text: number for number, text in tokens.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {role: ids.get(tokenizer.special_tokens.get(f"{role}_token", "")) for role in ROLES}
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(read, steps, name),
        "tokenizer.ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(vocab)],
        "tokenizer.ggml.token_type": [types.get(number, _UNUSED) for number in range(vocab)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
    }
    fields |= {
        f"tokenizer.ggml.{ROLES[role]}_token_id": number for role, number in special.items() if number is not None
    }
    for template, text in tokenizer.chat_templates.items():
        fields["tokenizer.chat_template" + ("" if template == "default" else f".{template}")] = text
    return fields


def _steps(pre: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, one after another."""
    if pre.get("type") == "Sequence":
        for step in pre["pretokenizers"]:
            yield from _steps(step)
    elif pre:
        yield pre


def _pre(read: Mapping[str, Any], steps: list[Mapping[str, Any]], name: str) -> str:
    """llama.cpp's name of how words are cut; raises ModelError if it has none."""
    patterns: list[str] = []
    for step in steps:
        if step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2] if step.get("use_regex", True) else []
        else:
            patterns.append("")
    nfc = (read.get("normalizer") or {}).get("type") == "NFC"
    whole = bool(read["model"].get("ignore_merges"))
    for known, pre in PRE.items():
        if (pre.patterns, pre.whole_words, pre.nfc) == (tuple(patterns), whole, nfc):
            return known
    raise ModelError(f"{name} cuts words in a way that llama.cpp has no name for; it cannot be written as GGUF")
