"""Files of a Hugging Face folder, which is hostile until checked: their paths, JSON objects, weights."""

import json
from pathlib import Path

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.hf.safetensors_file import read_safetensors
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError

__all__ = ["folder_name", "inside", "read_fields", "read_text", "read_weights"]

# Bytes of a text file; the largest tokenizers have some 30 MB.
MAX_TEXT_BYTES = 1 << 28


def folder_name(folder: Path) -> str:
    """What the model in a folder is called: by its repository in the hub's cache, whose folders are commits."""
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        return home.parents[1].name.rpartition("--")[2]
    return home.name


def inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder; raises ModelError if it lies elsewhere or is not a regular file.

    Links must stay in the folder, except those of the hub's cache: from below snapshots/REVISION to the blobs beside
    it, and to those that all repositories share.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        special = real.exists() and not real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, not a name
        raise ModelError(f"{path} cannot be a file of the model ({error}); fetch it again") from error
    if Path(name).name != name or not (real.parent == home or _is_blob(real, home)):
        raise ModelError(f"{path} does not lie in the model's folder; copy it there, with a plain name")
    if special:
        raise ModelError(f"{path} is not a regular file; a model's files must be")
    return path


def _is_blob(file: Path, home: Path) -> bool:
    """Whether a file is the content of one of a snapshot of the hub's cache, in which `home` is a folder."""
    snapshots = next((place for place in home.parents if place.name == "snapshots"), None)
    if snapshots is None:
        return False
    repository = snapshots.parent
    shared = file.parent.parent == repository.parent / "blobs" and file.parent.name == file.name[:2]
    return file.parent == repository / "blobs" or shared


def read_text(folder: Path, name: str) -> str | None:
    """A text file, with or without a byte order mark; None if there is no such file."""
    path = inside(folder, name)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ModelError(f"{path} is larger than any such file; fetch it again")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 ({error}); fetch it again") from error


def read_fields(folder: Path, name: str) -> Fields | None:
    """The fields of a JSON object; None if there is no such file."""
    text, path = read_text(folder, name), folder / name
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; fetch it again")
    return Fields(path, value)


def read_weights(folder: Path) -> dict[str, StoredTensor[str]]:
    """Every tensor of the folder's model.safetensors, or of the files that its index names."""
    advice = "fetch it again"
    if (folder / "model.safetensors").exists():
        return read_safetensors(inside(folder, "model.safetensors"), advice)[0]
    index = read_fields(folder, "model.safetensors.index.json")
    if index is None:
        raise ModelError(f"{folder} has no model.safetensors; fetch it again")
    where = index.section("weight_map")
    files = {where.text(name) for name in where}
    stored: dict[str, StoredTensor[str]] = {}
    for file in sorted(files):
        tensors, _ = read_safetensors(inside(folder, file), advice)
        twice = sorted(tensors.keys() & stored.keys())
        if twice:
            raise ModelError(f"{folder / file}: tensor {twice[0]} is in another file too; fetch the model again")
        stored |= tensors
    missing = sorted(set(where) - stored.keys())
    if missing:
        raise ModelError(f"{index.path}: tensor {missing[0]} is in none of the files; the model is incomplete")
    return stored
