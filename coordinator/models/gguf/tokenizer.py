"""The tokenizer of a GGUF file, rebuilt from its metadata as a tokenizer.json.

Two families: "gpt2", byte-level BPE with merges, whose words are cut as `tokenizer.ggml.pre` names it
(`pre_tokenizers.py`), and "llama", SentencePiece's BPE, whose merges follow from the scores.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.gguf.pre_tokenizers import PRE, Pre, pre_of
from warmfront.coordinator.models.source import END_TOKENS, TokenizerFiles, end_ids
from warmfront.coordinator.models.tokenizer_json import one_line_errors
from warmfront.shared.errors import ModelError

__all__ = ["read_tokenizer"]

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "▁"
# All ways to cut a SentencePiece token in two are tried; published tokens have at most some 100 characters.
MAX_TOKEN_LENGTH = 1024
# Tokens that chat templates know by name, and the fields that have their ids.
ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
# Fields with ids of further tokens that end an answer: of a turn, of a message, of a piece of code.
ENDS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Of Phi-3's special tokens, those that leave the white space behind them alone.
KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def read_tokenizer(path: Path, fields: Mapping[str, Any]) -> TokenizerFiles | None:
    """The tokenizer that the metadata `fields` of the file at `path` describe; None if they have none.

    Raises ModelError for other families, unknown pre-tokenizers and damaged fields.
    """
    checked = Fields(path, fields)
    model = checked.text("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise ModelError(f"{path}: tokenizer '{model}' is not supported; gpt2 and llama are")
    tokens = checked.texts("tokenizer.ggml.tokens")
    types = checked.numbers("tokenizer.ggml.token_type", len(tokens), [NORMAL] * len(tokens))
    # As in llama.cpp: converters give tokens of added_tokens.json any type.
    types = [CONTROL if token in END_TOKENS else kind for token, kind in zip(tokens, types, strict=True)]
    with one_line_errors(f"{path}: the tokenizer's fields do not fit together", "fetch the file again"):
        if model == "gpt2":
            pre, note = _pre(checked)
            tokenizer = _byte_level(tokens, checked.texts("tokenizer.ggml.merges"), pre)
            add_bos, defaults = pre.add_bos, {}
        else:
            space, note = checked.flag("tokenizer.ggml.add_space_prefix", True), None
            scores = checked.numbers("tokenizer.ggml.scores", len(tokens))
            tokenizer = _sentence_piece(tokens, types, scores, space)
            add_bos, defaults = True, {"bos": 1, "eos": 2, "unk": 0}
        # Files do not say which tokens take the white space behind them; llama.cpp goes by the name, too.
        strips = any(name in checked.text("general.name", "").lower() for name in ("phi-3", "phi3"))
        _add_tokens(tokenizer, tokens, types, strips)
    roles = {role: checked.token(_id_of(name), len(tokens), defaults.get(role)) for role, name in ROLES.items()}
    ends = [roles["eos"], *(checked.token(_id_of(name), len(tokens)) for name in ENDS)]
    named = checked.under("tokenizer.chat_template.")
    templates = {"default": checked.text("tokenizer.chat_template", "")} | {name: named.text(name) for name in named}
    return TokenizerFiles(
        json=tokenizer.to_str(),
        chat_templates={name: template for name, template in templates.items() if template},
        special_tokens={f"{role}_token": tokens[number] for role, number in roles.items() if number is not None},
        bos_id=roles["bos"],
        eos_ids=end_ids(enumerate(tokens), ends),
        add_bos=roles["bos"] is not None and checked.flag("tokenizer.ggml.add_bos_token", add_bos),
        note=note,
    )


def _id_of(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"


def _pre(fields: Fields) -> tuple[Pre, str | None]:
    """How words are cut; and a line for the user where the file does not say it."""
    name = fields.text("tokenizer.ggml.pre", "")
    if not name:
        return PRE["default"], "the file names no pre-tokenizer: words are cut as by default, answers may suffer"
    pre = pre_of(name)
    if pre is None:
        raise ModelError(
            f"{fields.path}: pre-tokenizer {name[:60]!r} is not known, and with another one many token ids would be "
            "wrong; use the model's Hugging Face folder"
        )
    return pre, None


def _byte_level(tokens: list[str], merges: list[str], pre: Pre) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    # Some files have merges whose result is no token; they are never applied.
    pairs = [pair for pair in pairs if "".join(pair) in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(tokens: list[str], types: list[int], scores: list[float], space: bool) -> Tokenizer:
    """`space`: put a space in front of the text and after each special token, as llama.cpp does."""
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = types.index(UNKNOWN) if UNKNOWN in types else 0
    merges = list(_merges(tokens, types, scores))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if space else escape
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space else steps)
    return tokenizer


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that joins into a third, best score first: SentencePiece merges the best-scoring pair."""
    if max(map(len, tokens), default=0) > MAX_TOKEN_LENGTH:
        raise ValueError(f"a token of more than {MAX_TOKEN_LENGTH} characters")
    pieces = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED)}
    for token in sorted(pieces, key=lambda token: (-scores[pieces[token]], pieces[token])):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(first, second) for first, second in splits if first in pieces and second in pieces]
        yield from sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], strips: bool) -> None:
    """Add the tokens that are matched in the text before it is cut into words.

    `strips`: special tokens take the white space behind them.
    """
    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds and token]
        tokenizer.add_tokens(
            [
                AddedToken(token, normalized=False, special=special, rstrip=strips and token not in KEEP_SPACE)
                for token in chosen
            ]
        )
