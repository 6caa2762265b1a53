"""A tokenizer as the packed model keeps it, ready within milliseconds.

The tokenizers library reads a tokenizer.json with the 262,144 tokens and 515,000 merges of Gemma in about a second, at
every start. So the vocabulary and the merges of a byte-pair tokenizer lie beside its tokenizer.json as tables, and
that keeps the single characters only: the library still finds added tokens, normalises, cuts the text into words and
these into characters, which `text/merging.py` joins. A tokenizer of another kind is kept as it is.

    u64      n
    n bytes  JSON: "tokenizer", the text of the tokenizer.json; "whole_words"; "lengths" of the tables in their order
    ...      the tables, if there are any, in the order of `Tables`
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers.pre_tokenizers import ByteLevel

from warmfront.coordinator.models.tokenizer_json import load_tokenizer

__all__ = ["PackedTokenizer", "Tables", "pack_tokenizer", "unpack_tokenizer"]

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
# Ids are indices of tables; no vocabulary has as many tokens.
_MAX_IDS = 1 << 24


class Tables(NamedTuple):
    """Tokens and merges of a vocabulary of n ids."""

    # [n + 1] where in `texts` the text of each id begins, and where the last one ends; unused ids have no text.
    bounds: Words
    # [n + 1] where in the next three the merges begin whose left part is this id.
    starts: Words
    # Of each merge: the id of its right part, ascending for each left part; its rank, low ones first; its result.
    rights: Words
    ranks: Words
    results: Words
    # The ids with a text, in the order of their texts; empty if words are never looked up as a whole.
    order: Words
    # UTF-8.
    texts: Bytes


class PackedTokenizer(NamedTuple):
    """What a packed model says of its tokenizer."""

    # Of the whole tokenizer, or if there are tables, of one with single characters only.
    json: str
    tables: Tables | None
    # A word that is a token is not built by merges.
    whole_words: bool


def pack_tokenizer(text: str) -> bytes:
    """The tokenizer.json `text` as the packed model keeps it. Raises what the library does for a broken one."""
    fast, description = load_tokenizer(text), json.loads(text)
    model = description["model"]
    added = {token.content: number for number, token in fast.get_added_tokens_decoder().items()}
    tables: tuple[npt.NDArray[Any], ...] = ()
    whole = bool(model.get("ignore_merges"))
    if _has_tables(description, added):
        vocab = model["vocab"]
        # The library decodes an added token to its content after normalising.
        texts = {number: token for token, number in vocab.items()} | {i: fast.id_to_token(i) for i in added.values()}
        tables = _tables(vocab, model["merges"], texts, whole)
        kept = added | {token: number for token, number in vocab.items() if len(token) == 1 or token in added}
        if model.get("byte_fallback"):
            kept |= {token: vocab[token] for byte in range(256) if (token := f"<0x{byte:02X}>") in vocab}
        if model.get("unk_token"):
            kept[model["unk_token"]] = vocab[model["unk_token"]]
        description["model"] = model | {"vocab": kept, "merges": [], "ignore_merges": False, "dropout": None}
        text = json.dumps(description, ensure_ascii=False)
    header = {"tokenizer": text, "whole_words": whole, "lengths": [len(table) for table in tables]}
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    return b"".join((len(body).to_bytes(8, "little"), body, *(table.tobytes() for table in tables)))


def unpack_tokenizer(data: Bytes) -> PackedTokenizer:
    """What `pack_tokenizer` has made."""
    at = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8:at].tobytes())
    tables = []
    for length, kind in zip(header["lengths"], (*[np.uint32] * (len(Tables._fields) - 1), np.uint8), strict=False):
        end = at + length * np.dtype(kind).itemsize
        tables.append(data[at:end].view(kind))
        at = end
    return PackedTokenizer(header["tokenizer"], Tables(*tables) if tables else None, header["whole_words"])


def _has_tables(description: Any, added: dict[str, int]) -> bool:
    """Whether merges of single characters are all there is to this tokenizer."""
    model = description["model"]
    vocab = model["vocab"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if model.get("unk_token") not in (None, *vocab) or max((*vocab.values(), *added.values(), 0)) >= _MAX_IDS:
        return False
    if any(len(text) == 1 and text not in vocab for text in added):  # would be a character of words, too
        return False
    # A word is looked up by its characters, so none of them may be missing or changed.
    letters = "ByteLevel" in json.dumps(description.get("pre_tokenizer")) and vocab.keys() >= set(ByteLevel.alphabet())
    return not model.get("ignore_merges") or letters


def _tables(
    vocab: dict[str, int], merges: Iterable[Any], texts: dict[int, str], whole: bool
) -> tuple[npt.NDArray[Any], ...]:
    """The tables, in the order of `Tables`, of a vocabulary whose ids are shown as `texts`."""
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
    # Of equal merges the last one counts, as in the library.
    ranks = {(vocab[left], vocab[right]): (rank, vocab[left + right]) for rank, (left, right) in enumerate(pairs)}
    rows = np.array([(*pair, *merge) for pair, merge in ranks.items()], np.uint32).reshape(-1, 4)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    count = max(texts, default=-1) + 1
    spelled = [texts.get(i, "").encode() for i in range(count)]
    bounds = np.cumsum([0, *map(len, spelled)])
    starts = np.searchsorted(rows[:, 0], np.arange(count + 1))
    order = sorted((i for i in vocab.values() if spelled[i]), key=spelled.__getitem__) if whole else []
    tables = (bounds, starts, rows[:, 1], rows[:, 2], rows[:, 3], order)
    return (*(np.ascontiguousarray(table, np.uint32) for table in tables), np.frombuffer(b"".join(spelled), np.uint8))
