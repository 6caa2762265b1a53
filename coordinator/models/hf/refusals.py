"""Folders that are no language model that runs: what each is instead, what is missing, what to do; one line."""

from collections.abc import Collection
from pathlib import Path

from warmfront.coordinator.models.families import FAMILIES, supported
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.hf.folder import read_fields
from warmfront.coordinator.models.hf.four_bits import METHODS
from warmfront.shared.errors import ModelError

__all__ = ["checked_config", "what_else"]

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FOREIGN = (".npz", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".nemo")
# Pickles that are not weights.
_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state")
# Files that old AutoGPTQ and AutoAWQ wrote instead of a field of config.json.
_QUANTISED = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Families that read text and write none; others are known by the name of their class.
_ENCODERS = frozenset(
    (
        "albert",
        "bert",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
    )
)
_NOTHING = "has no model.safetensors; other weight files are not supported, save it as safetensors"
_ENCODER_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def checked_config(folder: Path, files: Collection[str]) -> Fields:
    """The fields of the folder's config.json; raises ModelError if they are not of a language model that runs, or if it
    has no weights that can be read.

    `files`: what the folder has, or will have when its weights have been fetched.
    """
    config = read_fields(folder, "config.json")
    if config is None:
        reason = what_else(files)
        if reason == _NOTHING:
            reason = "has no config.json; give a Hugging Face folder or a GGUF file"
        raise ModelError(f"{folder} {reason}")
    if "adapter_config.json" in files:
        raise ModelError(f"{folder} has an adapter, which is not supported; merge it into the model's weights")
    model_type = config.text("model_type", "")
    if model_type not in FAMILIES:
        raise ModelError(f"{folder}{_other_type(config, model_type)}{supported(model_type)}")
    if method := _quantised_by(config, files):
        raise ModelError(
            f"{folder} is quantised by {method}, which is not supported; give the unquantised model or a GGUF"
        )
    if "model.safetensors" not in files and "model.safetensors.index.json" not in files:
        raise ModelError(f"{folder} {what_else(files)}")
    return config


def _other_type(config: Fields, model_type: str) -> str:
    """What a model of an unknown type is, behind the folder's name."""
    classes = config.texts("architectures") if config.holds("architectures", list) else []
    if "vision_config" in config or "vision_tower" in config or "audio_config" in config:
        return f": '{model_type}' sees or hears, and is not supported: only models of text alone are"
    if config.flag("is_encoder_decoder", False):
        return f": '{model_type}' is an encoder with a decoder, which is not supported: only decoders are"
    if model_type in _ENCODERS or any(name.endswith(_ENCODER_HEADS) for name in classes):
        return f": '{model_type}' is an encoder, which writes no text; it is not supported"
    return f": model type '{model_type}' is not supported"


def _quantised_by(config: Fields, files: Collection[str]) -> str | None:
    if config.holds("quantization", dict):  # beside a quantization_config that says the same
        return "MLX"
    settings = config.section("quantization_config")
    if [*settings]:
        method = settings.text("quant_method", "some method")
        # gpt-oss is published so, and read; what of GPTQ and AWQ is not is told by the reader.
        read = method in METHODS or (method == "mxfp4" and config.text("model_type") == "gpt_oss")
        return None if read else method
    return next((method for file, method in _QUANTISED.items() if file in files), None)


def what_else(files: Collection[str]) -> str:
    """What a folder of such files is that has no model as safetensors, and what to do: the end of a sentence."""
    ggufs = sorted(file for file in files if file.lower().endswith(".gguf"))
    pickled = sorted(file for file in files if file.endswith(_PICKLED) and not file.startswith(_TRAINING))
    foreign = sorted(file for file in files if file.endswith(_FOREIGN))
    if "model_index.json" in files:
        return "is a pipeline of diffusers, which makes pictures or the like; give a language model"
    if "adapter_config.json" in files:
        return (
            "is an adapter (LoRA) without the model that it changes; merge it into that one "
            "(merge_and_unload of peft) and give the result"
        )
    if ggufs:
        return f"has GGUF files and no safetensors; give one of them, such as {ggufs[0]}"
    if pickled:
        return (
            f"has its weights only as {pickled[0]}, which is pickled: loading it could run code; "
            "save them as model.safetensors (save_pretrained of transformers does)"
        )
    if foreign:
        return f"has weights of another program, {foreign[0]}; give safetensors or a GGUF file"
    return _NOTHING
