"""Which files of a repository are a model: those of a folder that readers read, or the parts of a GGUF file.

Pickled weights (.bin, .pt) are never among them: loading those can run code.
"""

import re
from collections.abc import Collection, Iterable

from warmfront.coordinator.models.hf.refusals import what_else
from warmfront.coordinator.models.hub.names import HubName, is_file_name
from warmfront.coordinator.models.parts import part_names, split_name
from warmfront.shared.errors import ModelError

__all__ = ["INDEX", "WEIGHTS", "gguf_files", "gguf_parts", "is_folder", "settings"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Configuration, tokenizer, templates; an adapter's and an index of pipelines only to be refused by name.
_SETTINGS = frozenset(
    (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        "adapter_config.json",
        "predictor.safetensors",
        INDEX,
    )
)
# GGUF files that are no model by themselves: vision projectors, statistics for quantising.
_OTHER_GGUF = re.compile(r"(^|/)mmproj|imatrix", re.IGNORECASE)
# Choices that a message lists.
_LISTED = 12


def is_folder(files: Collection[str]) -> bool:
    """Whether the repository as a whole is a model: a configuration, and weights as safetensors."""
    return "config.json" in files and (WEIGHTS in files or INDEX in files)


def settings(files: Iterable[str]) -> list[str]:
    """The small files of a folder, without its weights."""
    return sorted(_SETTINGS.intersection(files))


def gguf_files(files: Iterable[str]) -> list[str]:
    """The GGUF models of a repository; of a split one the first part."""
    found = []
    for file in sorted(files):
        model = file.lower().endswith(".gguf") and not _OTHER_GGUF.search(file)
        if model and is_file_name(file) and split_name(file)[1] == 1:
            found.append(file)
    return found


def gguf_parts(name: HubName, files: Collection[str]) -> list[str]:
    """All parts, in order, of the one GGUF file that is meant. Raises ModelError if none is, or several are."""
    models = gguf_files(files)
    if name.file is None:
        found = models
    elif name.file.lower().endswith(".gguf"):
        found = [name.file] if name.file in files else []
    else:
        found = [file for file in models if _is_quantised_as(file, name.file)]
    if len(found) != 1:
        raise ModelError(_none_or_several(name, files, models, found))
    parts = part_names(found[0])
    missing = [part for part in parts if part not in files]
    if missing:
        raise ModelError(f"{name.repository} lacks {missing[0]}, a part of {found[0]}; choose another file")
    return parts


def _is_quantised_as(file: str, quant: str) -> bool:
    """As llama.cpp takes it: the last words of the name, in upper or lower case."""
    return re.search(rf"(^|[-./]){re.escape(quant)}$", split_name(file)[0], re.IGNORECASE) is not None


def _none_or_several(name: HubName, files: Collection[str], models: list[str], found: list[str]) -> str:
    choices = found or models
    listed = ", ".join(choices[:_LISTED]) + (", ..." if len(choices) > _LISTED else "")
    if not models:
        return f"{name.repository} {what_else(files)}"
    if found:
        return f"{name}: several files could be meant; choose one of {listed}, like {name.repository}:{found[0]}"
    return f"{name.repository} has no GGUF file {name.file}; there are {listed}"
