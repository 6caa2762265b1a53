"""GGUF files that are no language model that runs: what each is instead, and what to do; one line."""

from pathlib import Path

from warmfront.coordinator.models.families import FAMILIES, supported
from warmfront.coordinator.models.fields import Fields
from warmfront.shared.errors import ModelError

__all__ = ["checked_architecture"]

# By general.type; "model" is the usual one.
_TYPES = {
    "adapter": "is an adapter (LoRA) without the model that it changes; merge it into that one (llama-export-lora)",
    "mmproj": "is the part of a model that sees or hears, not its language model; give the file beside it",
    "imatrix": "is statistics for quantising, not a model; give the file beside it",
    "vocab": "is a vocabulary without weights; give the whole model",
}
_ENCODERS = ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "modern-bert", "neo-bert", "t5encoder")


def checked_architecture(path: Path, fields: Fields) -> str:
    """The architecture, one of `FAMILIES`; raises ModelError if the file is anything else than such a model."""
    if "ffn_group_size" in fields:
        raise ModelError(f"{path} is an order of a model's neurons, as SparkInfer writes it; give the model itself")
    architecture = fields.text("general.architecture")
    kind = "mmproj" if architecture == "clip" else fields.text("general.type", "model")
    if kind in _TYPES:
        raise ModelError(f"{path} {_TYPES[kind]}")
    if architecture in FAMILIES:
        return architecture
    if architecture in _ENCODERS:
        raise ModelError(f"{path}: '{architecture}' is an encoder, which writes no text{supported(architecture)}")
    raise ModelError(f"{path}: architecture '{architecture}' is not supported{supported(architecture)}")
