"""Which files of a repository are taken.  pytest tests/coordinator/models/hub/test_choice.py"""

import pytest

from warmfront.coordinator.models.hub.choice import gguf_parts, is_folder, settings
from warmfront.coordinator.models.hub.names import parse
from warmfront.shared.errors import ModelError

GGUFS = [
    "README.md",
    "mmproj-model-f16.gguf",
    "model.imatrix.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "model.i1-Q2_K.gguf",
    "model-UD-Q2_K_XL.gguf",
    "Q8_0/model-Q8_0-00001-of-00002.gguf",
    "Q8_0/model-Q8_0-00002-of-00002.gguf",
    "cut-F16-00001-of-00003.gguf",
    "cut-F16-00003-of-00003.gguf",
    "a-BF16.gguf",
    "b-BF16.gguf",
]
SPLIT = ["Q8_0/model-Q8_0-00001-of-00002.gguf", "Q8_0/model-Q8_0-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("Q4_K_M", ["model-Q4_K_M.gguf"]),
        ("q4_k_s", ["model-Q4_K_S.gguf"]),
        ("Q2_K", ["model.i1-Q2_K.gguf"]),
        ("UD-Q2_K_XL", ["model-UD-Q2_K_XL.gguf"]),
        ("Q2_K_XL", ["model-UD-Q2_K_XL.gguf"]),
        ("Q8_0", SPLIT),
        (SPLIT[0], SPLIT),
        (SPLIT[1], SPLIT),
        ("mmproj-model-f16.gguf", ["mmproj-model-f16.gguf"]),
    ],
)
def test_gguf_files(file: str, expected: list[str]) -> None:
    name = parse(f"org/name:{file}")
    assert name is not None
    assert gguf_parts(name, GGUFS) == expected


@pytest.mark.parametrize(
    ("file", "files", "message"),
    [
        ("Q4_K", GGUFS, r"org/name has no GGUF file Q4_K; there are Q8_0/model.*, a-BF16\.gguf, b-BF16"),
        ("other.gguf", GGUFS, r"no GGUF file other\.gguf; there are"),
        ("BF16", GGUFS, r"several files could be meant; choose one of a-BF16\.gguf, b-BF16\.gguf, like org/name:a-BF"),
        ("F16", GGUFS, r"lacks cut-F16-00002-of-00003\.gguf, a part of cut-F16-00001"),
        ("Q4_0", ["pytorch_model.bin"], r"weights only as pytorch_model\.bin, which is pickled"),
        ("Q4_0", [f"m-{i:02}-IQ1_S.gguf" for i in range(40)], r"m-11-IQ1_S\.gguf, \.\.\.$"),
        ("Q4_0", ["README.md"], r"has no model\.safetensors"),
    ],
)
def test_none_or_several(file: str, files: list[str], message: str) -> None:
    name = parse(f"org/name:{file}")
    assert name is not None
    with pytest.raises(ModelError, match=message):
        gguf_parts(name, files)


def test_a_folder_s_settings() -> None:
    files = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "pytorch_model.bin",
        "train.py",
        "x.json",
    ]
    assert is_folder(files)
    assert settings(files) == ["config.json", "tokenizer.json"]
    assert not is_folder(["config.json", "pytorch_model.bin"])
