"""Token ids against llama.cpp's and transformers' tokenizers.

Run: pytest tests/coordinator/models/gguf/test_tokenizer.py
"""

import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models, normalizers, trainers

from warmfront.coordinator.models.gguf.pre_tokenizers import PRE
from warmfront.coordinator.models.gguf.reader import GgufSource
from warmfront.coordinator.models.gguf.tokenizer import read_tokenizer
from warmfront.coordinator.models.source import TokenizerFiles
from warmfront.shared.errors import ModelError

TEXTS = (
    "",
    "Hello world",
    " The lighthouse keeper's diary: they'll've gone, I'M sure; WE'D know.",
    "12 3456 7890123 3.14159 1,000,000 x86-64 ²³½ ٣٤٥",
    "naïve café Ünïcödé — “quotes” … 日本語のテキスト 中文字符 한국어 עברית العربية हिन्दी ไทย",
    "emoji 🙂🙃 family 👨‍👩‍👧‍👦 flags 🇩🇪 rare 𝔘𝔫𝔦 \u200b zero\u00adwidth",
    "def front(x: int) -> int:\n\tif x != 0x1F:  # warm\n        return [y**2 for y in range(10)]\n\n\n    pass",
    "  leading, trailing  \n\n \t mixed   \r\n  spaces \u00a0 nbsp   ",
    "$100 + €5 = <tag attr='v'>&amp;</tag> a|b^c~d `code` \\path\\n #1! @me %d {}()[]",
    "CamelCaseHTTPServer snake_case_name SCREAMING_CASE iPhone",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|endoftext|>",
)


def ids(files: TokenizerFiles, text: str) -> list[int]:
    return Tokenizer.from_str(files.json).encode(text, add_special_tokens=False).ids


LLAMA_CPP = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=True) for text in json.load(sys.stdin)]))
"""


needs_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")


def llama_cpp_ids(path: Path, texts: tuple[str, ...]) -> list[list[int]]:
    """In a process of its own: llama.cpp keeps descriptors open, and ends the process that gives it a bad file."""
    command = [sys.executable, "-c", LLAMA_CPP, str(path)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    result: list[list[int]] = json.loads(done.stdout)
    return result


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def smollm2_fields(smollm2: Path) -> dict[str, Any]:
    return fields_of(smollm2)


def tokenizer_of(path: Path, fields: dict[str, Any]) -> TokenizerFiles:
    files = read_tokenizer(path, fields)
    assert files is not None
    return files


@needs_llama_cpp
def test_smollm2_as_in_llama_cpp(smollm2: Path, smollm2_fields: dict[str, Any]) -> None:
    files = tokenizer_of(smollm2, smollm2_fields)
    assert [ids(files, text) for text in TEXTS] == llama_cpp_ids(smollm2, TEXTS)
    assert files.note is None


def test_smollm2_as_in_transformers(smollm2: Path, smollm2_fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    files = tokenizer_of(smollm2, smollm2_fields)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # transformers does not cut digits off for smollm, which shows only on digits beyond ASCII ("Ġ²" is a token).
    for text in (text for text in TEXTS if not any(c.isnumeric() and not c.isascii() for c in text)):
        assert ids(files, text) == theirs.encode(text, add_special_tokens=False), text


def test_smollm2_settings(smollm2: Path, smollm2_fields: dict[str, Any]) -> None:
    files = tokenizer_of(smollm2, smollm2_fields)
    tokens = smollm2_fields["tokenizer.ggml.tokens"]
    assert {tokens[i] for i in files.eos_ids} == {"<|endoftext|>", "<|im_end|>", "<reponame>"}
    assert (files.bos_id, files.add_bos) == (1, False)
    assert "<|im_start|>" in files.chat_templates["default"]
    assert GgufSource(smollm2).tokenizer == files


def test_decoding_returns_the_text(smollm2: Path, smollm2_fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of(smollm2, smollm2_fields).json)
    for text in TEXTS:
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(encoded, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode("<|im_start|>Hi<|im_end|>").ids) == "Hi"


@needs_llama_cpp
@pytest.mark.parametrize("pre", sorted(PRE.keys() - {"youtu"}))  # of which not all versions look up whole words
def test_words_are_cut_as_in_llama_cpp(
    tiny_gguf: Callable[..., Path], smollm2_fields: dict[str, Any], pre: str
) -> None:
    fields = {k: v for k, v in smollm2_fields.items() if k.startswith("tokenizer.")} | {"tokenizer.ggml.pre": pre}
    fields.pop("tokenizer.ggml.add_bos_token")
    # Without the later merges many tokens can only be had whole, which some pre-tokenizers ask for and others not.
    fields["tokenizer.ggml.merges"] = fields["tokenizer.ggml.merges"][:5000]
    path = tiny_gguf(fields=fields, architecture="llama")
    files = tokenizer_of(path, fields_of(path))
    # llama.cpp's version of tekken's pattern takes combining marks for no part of a word; the model's own does.
    texts = tuple(t for t in TEXTS if pre != "tekken" or not any(unicodedata.category(c)[0] == "M" for c in t))
    assert [ids(files, text) for text in texts] == llama_cpp_ids(path, texts)
    assert files.add_bos == (pre in ("llama-bpe", "tekken", "chameleon"))
    assert files.note is None


@pytest.fixture(scope="module")
def sentence_piece() -> dict[str, Any]:
    """A vocabulary in SentencePiece's manner: specials, bytes, then pieces with falling scores."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=1200, show_progress=False)
    corpus = "\n".join((*TEXTS, Path(__file__).read_text()))
    tokenizer.train_from_iterator(corpus.split("\n"), trainer)
    vocab = tokenizer.get_vocab()
    # No piece may be spelled as a special token or byte: llama.cpp aborts on a vocabulary with two equal tokens.
    pieces = sorted((piece for piece in vocab if "<" not in piece), key=lambda piece: vocab[piece])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|im_end|>", "<think>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 3, 4]
    chars = [piece for piece in pieces if len(piece) == 1]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0, 0.0]
    # Single characters come last in SentencePiece's own order.
    for number, piece in enumerate(chars):
        scores[259 + pieces.index(piece)] = -10_000.0 - number
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@needs_llama_cpp
@pytest.mark.parametrize("space", [True, False])
def test_sentence_piece_as_in_llama_cpp(
    tiny_gguf: Callable[..., Path], sentence_piece: dict[str, Any], space: bool
) -> None:
    path = tiny_gguf(fields=sentence_piece | {"tokenizer.ggml.add_space_prefix": space})
    files = tokenizer_of(path, fields_of(path))
    texts = (*TEXTS, "unseen: ʬ ꙮ 🜁", "<s>one</s><s> two<think>three", "          many     spaces")
    assert [ids(files, text) for text in texts] == llama_cpp_ids(path, texts)
    tokenizer = Tokenizer.from_str(files.json)
    for text in texts:
        # A space put in front of the text is taken away again; one after a special token stays.
        if "<" not in text:
            assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert (files.bos_id, files.add_bos) == (1, True)
    assert {sentence_piece["tokenizer.ggml.tokens"][i] for i in files.eos_ids} == {"</s>", "<|im_end|>"}


def test_no_tokenizer_and_damaged_ones(smollm2: Path, smollm2_fields: dict[str, Any]) -> None:
    assert read_tokenizer(smollm2, {}) is None
    missing = {k: v for k, v in smollm2_fields.items() if k != "tokenizer.ggml.merges"}
    with pytest.raises(ModelError, match=r"field tokenizer\.ggml\.merges is missing"):
        read_tokenizer(smollm2, missing)
    with pytest.raises(ModelError, match=r"field tokenizer\.ggml\.token_type is \[1, 2\], not a list of 49152 numbers"):
        read_tokenizer(smollm2, smollm2_fields | {"tokenizer.ggml.token_type": [1, 2]})
