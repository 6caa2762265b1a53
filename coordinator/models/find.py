"""The path of the model that the user named: a path, the default model, or a name on the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path

from warmfront.coordinator.models.default_model import DEFAULT_MODEL, fetch_default
from warmfront.coordinator.models.hub.names import parse
from warmfront.shared.errors import ModelError

__all__ = ["find_model"]


def find_model(model: str, say: Callable[[str], None], progress: Callable[[str, int, int], None]) -> Path:
    """The path `model` if it exists; else that of the file or folder in a cache, fetched on first use.

    `say` gets a line for each step of fetching, `progress` (what, bytes done, bytes in all). Raises ModelError if there
    is no such model or fetching it fails, ResourceError if the cache cannot hold it.
    """
    if model == DEFAULT_MODEL:
        return fetch_default(say)
    path = Path(model)
    if path.exists():
        return path
    name = parse(model)
    if name is None:
        raise ModelError(
            f"no such model: {model}; give a GGUF file, a Hugging Face folder, a name of the hub like ORG/NAME or "
            f"ORG/NAME:Q4_K_M, or {DEFAULT_MODEL}"
        )
    from warmfront.coordinator.models.hub.fetch import find  # not needed for a path

    return find(name, say, progress)
