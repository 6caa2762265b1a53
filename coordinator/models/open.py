"""Opening a model, whatever its format."""

from pathlib import Path

from warmfront.coordinator.models.parts import parts_of
from warmfront.coordinator.models.source import Source
from warmfront.shared.errors import ModelError

__all__ = ["model_files", "open_source"]


def open_source(path: Path) -> Source:
    """Open a Hugging Face folder or a GGUF file; raises ModelError if it is neither, damaged or not supported."""
    # Imported here: most starts find the model packed already and need no reader.
    from warmfront.coordinator.models.gguf.file import is_gguf
    from warmfront.coordinator.models.gguf.reader import GgufSource
    from warmfront.coordinator.models.hf.reader import HfSource

    model_files(path)
    if path.is_dir():
        return HfSource(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a GGUF file or a Hugging Face folder")
    if path.suffix != ".gguf" and not is_gguf(path):
        raise ModelError(f"{path} is not a GGUF file or a Hugging Face folder; give one of the two")
    return GgufSource(path)


def model_files(path: Path) -> list[Path]:
    """`path` and its other parts, or the files of the folder.

    Raises ModelError for a part that is missing, and for a pipe or a device: reading one could block forever.
    """
    try:
        files = sorted(p for p in path.iterdir() if p.exists() and not p.is_dir()) if path.is_dir() else parts_of(path)
        special = [file for file in files if file.exists() and not file.is_file()]
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error
    if special:
        raise ModelError(f"{special[0]} is a pipe or a device; a model's files must be regular files")
    return files
