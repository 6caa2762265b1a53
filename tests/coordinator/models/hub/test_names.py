"""What is a name of the hub and what is not.  pytest tests/coordinator/models/hub/test_names.py"""

import pytest

from warmfront.coordinator.models.hub.names import HubName, is_file_name, parse
from warmfront.shared.errors import ModelError


@pytest.mark.parametrize(
    ("text", "repository", "file"),
    [
        ("org/name", "org/name", None),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", None),
        ("o_1/n", "o_1/n", None),
        ("org/name:Q4_K_M", "org/name", "Q4_K_M"),
        ("org/name:ud-q4_k_xl", "org/name", "ud-q4_k_xl"),
        ("org/name:model.gguf", "org/name", "model.gguf"),
        ("org/name:BF16/model-00001-of-00002.GGUF", "org/name", "BF16/model-00001-of-00002.GGUF"),
    ],
)
def test_names(text: str, repository: str, file: str | None) -> None:
    assert parse(text) == HubName(repository, file)
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "a/..",
        "a/.b",
        "a/b.",
        "a--b/c",
        "a/b--c",
        "a/b..c",
        "a/b c",
        "a/b\n",
        "a/é",
        "-a/b",
        "a/" + "b" * 97,
        "folder/model.gguf",
        "a/b.git",
        "https://host/a/b",
        "a\\b",
        "~/a",
    ],
)
def test_what_is_none(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    "file",
    ["", "../x.gguf", "a/../x.gguf", "/x.gguf", "a//x.gguf", "./x.gguf", "x\0.gguf", "x\n.gguf", "a" * 64, "a b"],
)
def test_what_a_colon_may_not_be_followed_by(file: str) -> None:
    with pytest.raises(ModelError, match="no GGUF file") as caught:
        parse(f"org/name:{file}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["..", "a/../b", "/etc/passwd", "a\\b", "", ".git/config", "a/" * 9 + "b", "x" * 201])
def test_files_that_a_repository_may_not_have(path: str) -> None:
    assert not is_file_name(path)
