"""How the text of a byte-level vocabulary is cut into words: what `tokenizer.ggml.pre` of a GGUF file names.

The names are llama.cpp's (`llama-vocab.cpp`). The patterns are those of the models' own tokenizer.json, which
llama.cpp's equal wherever its regular expressions can; where they cannot, as for capitals beyond ASCII in gpt-4o's,
the model was trained with the published ones.
"""

from typing import NamedTuple

__all__ = ["PRE", "Pre", "pre_of"]


class Pre(NamedTuple):
    """How text is cut into words: patterns applied one after another; each match is a word."""

    patterns: tuple[str, ...]
    # A word that is a token as a whole is not built by merges.
    whole_words: bool = False
    add_bos: bool = False
    # Text is composed first, as Qwen's own tokenizers do: without it a decomposed accent is cut off its letter.
    nfc: bool = False


CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
ANY_CASE = rf"(?i:{CONTRACTIONS})"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS, OTHERS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{ANY_CASE}|{WORDS}|\p{{N}}{{1,3}}|{OTHERS}|{SPACES}"
QWEN2 = rf"{ANY_CASE}|{WORDS}|\p{{N}}|{OTHERS}|{SPACES}"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(ending: str, no_letters: str = "") -> str:
    """Words of capitals and small letters, cut before a capital behind a small letter."""
    upper, lower = f"[{UPPER}{no_letters}]", f"[{LOWER}{no_letters}]"
    front = r"[^\r\n\p{L}\p{N}]?"
    return f"{front}{upper}*{lower}+{ending}|{front}{upper}+{lower}*{ending}"


TEKKEN = _cased("") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O_WORDS, GPT4O_REST = _cased(f"{ANY_CASE}?"), rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = rf"{GPT4O_WORDS}|\p{{N}}{{1,3}}|{GPT4O_REST}"
KIMI = r"\p{Han}+|" + _cased(f"{ANY_CASE}?", r"&&[^\p{Han}]") + rf"|\p{{N}}{{1,3}}|{OTHERS}|{SPACES}"
# Letters with a case, as DeepSeek's first vocabularies list them.
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK3_DIGITS, DEEPSEEK3_CJK = r"\p{N}{1,3}", "[一-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + SPACES
)
BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
# From the end of a number in threes.
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
PRE = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Pre((GPT2,)),
    "smollm": Pre((r"\p{N}", GPT2)),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "llama-bpe": Pre((LLAMA3,), whole_words=True, add_bos=True),
    "smaug-bpe": Pre((LLAMA3,)),
    "qwen2": Pre((QWEN2,), nfc=True),
    "stablelm2": Pre((QWEN2,)),
    "qwen35": Pre(
        (rf"{ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",),
        nfc=True,
    ),
    "tekken": Pre((TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": Pre((GPT4O,)),
    "tiny_aya": Pre((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)),
    "kimi-k2": Pre((KIMI,)),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-llm": Pre(
        (
            r"[\r\n]",
            rf"\s?[{CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            r"[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        )
    ),
    "deepseek-v3": Pre((DEEPSEEK3_DIGITS, DEEPSEEK3_CJK, DEEPSEEK3)),
    "afmoe": Pre(
        (
            THREES,
            "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
            "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            DEEPSEEK3,
        )
    ),
    "youtu": Pre(
        (
            "[가-힣ㄱ-\u318e]+|[！…“”‘’—：；，\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+"
            "|[一-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            rf"{GPT4O_WORDS}|\p{{N}}|{GPT4O_REST}",
        ),
        whole_words=True,
    ),
    "seed-coder": Pre((rf"{ANY_CASE}|{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",)),
    "exaone-moe": Pre(
        (
            rf"{ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "jais-2": Pre(
        (
            rf"{ANY_CASE}|{WORDS}|\p{{N}}{{1,3}}|{OTHERS}|\s*[\r\n]+|"
            + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
            + r"|\s",
        )
    ),
    "superbpe": Pre((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "bloom": Pre((BLOOM,)),
    "viking": Pre((BLOOM, r"\p{N}")),
    "chameleon": Pre(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        add_bos=True,
    ),
}
ALIASES = {
    "gpt-2": """phi-2 mpt olmo exaone4 a.x-4.0 gigachat granite-docling jais jina-de jina-es jina-v1-en jina-v2-code
        jina-v2-de jina-v2-es mellum modern-bert roberta-bpe trillion""",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 midm-2.0 pixtral lfm2 jina-v5-nano",
    "smaug-bpe": "dbrx glm4 chatglm-bpe",
    "stablelm2": """deepseek-r1-qwen megrez hunyuan bailingmoe bailingmoe2 grok-2 kormo llada-moe solar-open f2llmv2""",
    "gpt-4o": "llama4 kanana2 minimax-m2 talkie",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "tiny_aya": "cohere2moe",
    "bloom": "poro-chat gpt3-finnish",
}
_NAMED = PRE | {alias: PRE[name] for name, aliases in ALIASES.items() for alias in aliases.split()}


def pre_of(name: str) -> Pre | None:
    """How words are cut where a file says `name`; None for a name that is not known."""
    return _NAMED.get(name)
