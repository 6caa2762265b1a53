"""Names of models on the hub: ORG/NAME for a folder, ORG/NAME:FILE.gguf or ORG/NAME:QUANT for a GGUF file.

A name becomes part of addresses and of paths in the hub's cache, so it holds nothing that could lead elsewhere.
"""

import re
from typing import NamedTuple

from warmfront.shared.errors import ModelError

__all__ = ["HubName", "is_file_name", "parse"]

# As the hub has them, where "--" separates the parts of a folder's name in the cache.
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}", re.ASCII)
_QUANT = re.compile(r"\w[\w.-]{0,62}", re.ASCII)
_FILE = re.compile(r"(?:\w[\w.+ ()=-]*/){0,4}\w[\w.+ ()=-]*", re.ASCII)
_MAX_FILE = 200


class HubName(NamedTuple):
    """A model on the hub."""

    # ORG/NAME.
    repository: str
    # The path of a GGUF file in it, or its quantisation, such as Q4_K_M; None for the repository as a whole.
    file: str | None

    def __str__(self) -> str:
        return self.repository if self.file is None else f"{self.repository}:{self.file}"


def parse(text: str) -> HubName | None:
    """The model that `text` names; None if it is no name of the hub.

    Raises ModelError for a repository with something behind the colon that can be neither file nor quantisation.
    """
    repository, colon, file = text.partition(":")
    # "folder/model.gguf" is a path with a typing error, not a repository.
    if not _REPOSITORY.fullmatch(repository) or repository.lower().endswith((".gguf", ".git")):
        return None
    if not colon:
        return HubName(repository, None)
    if not (is_file_name(file) if file.lower().endswith(".gguf") else _QUANT.fullmatch(file)):
        raise ModelError(
            f"{text}: what follows the colon is no GGUF file; write it like {repository}:model.gguf "
            f"or {repository}:Q4_K_M"
        )
    return HubName(repository, file)


def is_file_name(path: str) -> bool:
    """Whether `path`, by which a repository calls one of its files, is a plain relative one without odd characters."""
    return len(path) <= _MAX_FILE and _FILE.fullmatch(path) is not None
