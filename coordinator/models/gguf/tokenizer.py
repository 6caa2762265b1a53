"""The tokenizer of a GGUF file, rebuilt from its metadata as a tokenizer.json.

Two families: "gpt2", byte-level BPE with merges, whose words are cut by the regular expressions that
`tokenizer.ggml.pre` names (as in llama.cpp's `llama-vocab.cpp`, in the spelling of the models' own tokenizer.json),
and "llama", SentencePiece's BPE, whose merges follow from the scores.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.source import TokenizerFiles, end_ids
from warmfront.coordinator.models.tokenizer_json import one_line_errors
from warmfront.shared.errors import ModelError

__all__ = ["read_tokenizer"]

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "▁"
# All ways to cut a SentencePiece token in two are tried; published tokens have at most some 100 characters.
MAX_TOKEN_LENGTH = 1024


class Pre(NamedTuple):
    """How text is cut into words: patterns applied one after another; each match is a word."""

    patterns: tuple[str, ...]
    # A word that is a token as a whole is not built by merges.
    whole_words: bool = False
    add_bos: bool = False


CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"(?i:{CONTRACTIONS})" + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Pre((GPT2,)),
    "smollm": Pre((r"\p{N}", GPT2)),
    "llama-bpe": Pre((LLAMA3,), whole_words=True, add_bos=True),
    "smaug-bpe": Pre((LLAMA3,)),
    "qwen2": Pre((LLAMA3.replace("{1,3}", ""),)),
    "tekken": Pre((TEKKEN,), whole_words=True, add_bos=True),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}
ALIASES = {
    **dict.fromkeys(("phi-2", "mpt", "olmo", "exaone4"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), "qwen2"),
    "dbrx": "smaug-bpe",
}


def read_tokenizer(path: Path, fields: Mapping[str, Any], notes: list[str]) -> TokenizerFiles | None:
    """The tokenizer that the metadata `fields` of the file at `path` describe; None if they have none.

    Appends to `notes` if the pre-tokenizer is unknown. Raises ModelError for other families and damaged fields.
    """
    checked = Fields(path, fields)
    model = checked.text("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise ModelError(f"{path}: tokenizer '{model}' is not supported; gpt2 and llama are")
    tokens = checked.texts("tokenizer.ggml.tokens")
    types = checked.numbers("tokenizer.ggml.token_type", len(tokens), [NORMAL] * len(tokens))
    with one_line_errors(f"{path}: the tokenizer's fields do not fit together", "fetch the file again"):
        if model == "gpt2":
            pre = _pre(checked, notes)
            tokenizer = _byte_level(tokens, checked.texts("tokenizer.ggml.merges"), pre)
            add_bos, bos, eos = pre.add_bos, None, None
        else:
            space = checked.flag("tokenizer.ggml.add_space_prefix", True)
            scores = checked.numbers("tokenizer.ggml.scores", len(tokens))
            tokenizer = _sentence_piece(tokens, types, scores, space)
            add_bos, bos, eos = True, 1, 2
        _add_tokens(tokenizer, tokens, types)
    ids = {
        name: checked.token(f"tokenizer.ggml.{name}_token_id", len(tokens), default)
        for name, default in (("bos", bos), ("eos", eos), ("eot", None), ("eom", None))
    }
    special = ((i, token) for i, token in enumerate(tokens) if types[i] == CONTROL)
    return TokenizerFiles(
        json=tokenizer.to_str(),
        chat_template=checked.text("tokenizer.chat_template", "") or None,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        eos_ids=end_ids(special, (ids["eos"], ids["eot"], ids["eom"])),
        add_bos=ids["bos"] is not None and checked.flag("tokenizer.ggml.add_bos_token", add_bos),
    )


def _pre(fields: Fields, notes: list[str]) -> Pre:
    name = fields.text("tokenizer.ggml.pre", "")
    known = PRE.get(ALIASES.get(name, name)) if name else None
    if known is None:
        notes.append(f"pre-tokenizer {name[:60]!r} is not known: words are cut as by default, answers may suffer")
    return known or PRE["default"]


def _byte_level(tokens: list[str], merges: list[str], pre: Pre) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre.whole_words))
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


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Add the tokens that are matched in the text before it is cut into words."""
    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds and token]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in chosen])
