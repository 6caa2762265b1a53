"""Where text is cut, by the name of the pre-tokenizer.

Checked once against llama.cpp's token ids, on a vocabulary that shows each cut; `test_tokenizer.py` compares with it
where it is installed.  pytest tests/coordinator/models/gguf/test_pre_tokenizers.py
"""

import pytest
from tokenizers import Regex, pre_tokenizers

from warmfront.coordinator.models.gguf.pre_tokenizers import ALIASES, PRE, pre_of

# Words, with | between them.
CASES, CAPITALS, MARKS = "I|'M| he|'ll", "get|User|Name", "Vie\u0323t|,x"
DIGITS = "x| =|{}|.`|7|\n\n| if"
ONE_BY_ONE = DIGITS.format("1|2|3|4|5")
THREES, FROM_THE_END = DIGITS.format("123|45"), DIGITS.format("12|345")
SMALL = "I|'|M| he|'ll"
WORDS = {
    "default": ("I|'|M| he|'|ll", "x| |=|123|45|.|`|7|\n\n| if", "getUserName", "Vie|\u0323|t|,|x"),
    "gpt-2": (SMALL, DIGITS.format("12345"), "getUserName", "Vie|\u0323|t|,|x"),
    "smollm": (SMALL, ONE_BY_ONE, "getUserName", "Vie|\u0323|t|,|x"),
    "falcon": ("I|'|M| he|'|ll", "x| |=|123|45|.`|7|\n\n| if", "getUserName", "Vie|\u0323|t|,|x"),
    "llama-bpe": (CASES, THREES, "getUserName", "Vie|\u0323t|,x"),
    "smaug-bpe": (CASES, THREES, "getUserName", "Vie|\u0323t|,x"),
    "qwen2": (CASES, ONE_BY_ONE, "getUserName", "Vie|\u0323t|,x"),
    "stablelm2": (CASES, ONE_BY_ONE, "getUserName", "Vie|\u0323t|,x"),
    "qwen35": (CASES, ONE_BY_ONE, "getUserName", MARKS),
    "tekken": (CASES, ONE_BY_ONE, CAPITALS, MARKS),
    "gpt-4o": ("I'M| he'll", THREES, CAPITALS, MARKS),
    "tiny_aya": ("I'M| he'll", FROM_THE_END, CAPITALS, MARKS),
    "kimi-k2": ("I'M| he'll", THREES, CAPITALS, MARKS),
    "deepseek-coder": ("I|'|M| he|'|ll", "x| =|1|2|3|4|5|.|`|7|\n|\n| if", "getUserName", "Vie|\u0323|t|,|x"),
    "deepseek-llm": ("I|'|M| he|'|ll", "x| =|12345|.`|7|\n|\n| if", "getUserName", "Vie|\u0323|t|,|x"),
    "deepseek-v3": (CASES, THREES, "getUserName", MARKS),
    "afmoe": (CASES, FROM_THE_END, "getUserName", MARKS),
    "youtu": ("I'M| he'll", ONE_BY_ONE, CAPITALS, MARKS),
    "seed-coder": (CASES, ONE_BY_ONE, "getUserName", "Vie|\u0323t|,x"),
    "exaone-moe": (CASES, ONE_BY_ONE, "getUserName", MARKS),
    "jais-2": (CASES, THREES, "getUserName", "Vie|\u0323t|,x"),
    "superbpe": ("I'M he'll", "x =|12|345|.`|7|\n\n if", "getUserName", "Vie\u0323t,x"),
    "bloom": ("I'M| he'll", "x| =12345|.|`7|\n\n| if", "getUserName", "Vie\u0323t|,|x"),
    "viking": ("I'M| he'll", "x| =|1|2|3|4|5|.|`|7|\n\n| if", "getUserName", "Vie\u0323t|,|x"),
    "chameleon": ("I|'|M| he|'|ll", "x| |=|1|2|3|4|5|.|`|7|\n|\n| if", "getUserName", "Vie|\u0323|t|,|x"),
}
# What only these do.
MORE = {
    "kimi-k2": "\u4f60\u597d|a",
    "deepseek-v3": "a|\u4f60\u597d|b",
    "afmoe": "a|\u4f60|b|1|234|567",
    "youtu": "a|\u4f60|\u201c|b",
    "exaone-moe": "a b c|!",
    "jais-2": "a|" + " " * 4 + "|" + " " * 2 + "| b",
    "seed-coder": "a|!|\n|b",
    "llama-bpe": "a|!\n|b",
    "superbpe": "1|234|567| a b",
    "chameleon": "a|  |b|IMGIMGABZ|c",
    "deepseek-llm": "\u00e9|\u212a\u1fd0|\u5f20",
}


def cut(name: str, text: str) -> str:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE[name].patterns]
    return "|".join(text[first:last] for _, (first, last) in pre_tokenizers.Sequence(splits).pre_tokenize_str(text))


@pytest.mark.parametrize("name", PRE)
def test_words(name: str) -> None:
    for words in (*WORDS[name], *([MORE[name]] if name in MORE else [])):
        assert cut(name, words.replace("|", "")) == words


def test_names() -> None:
    names = [*PRE, *(alias for aliases in ALIASES.values() for alias in aliases.split())]
    assert len(names) == len(set(names))
    assert all(pre_of(name) is not None for name in names)
    assert pre_of("brand-new") is pre_of("gemma4") is None
    assert {name for name in names if pre_of(name).add_bos} == {  # type: ignore[union-attr]
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "pixtral", "lfm2", "jina-v5-nano"),
        *("tekken", "chameleon"),
    }
