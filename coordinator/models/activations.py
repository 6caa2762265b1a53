"""Which activation a published model has: some files say nothing of it (GGUF), some another than it was trained with.

The first of those returned is the model's as far as its files tell. Where there are more, the others are as plausible:
the model is then tried with each of them when it is first loaded (`engine/activation_trial.py`). The default model need
not be tried: its content is known. Nor are mixtures of experts, whose names tell where they were trained with another.
"""

from warmfront.coordinator.models.default_model import default_file
from warmfront.coordinator.models.fields import Fields
from warmfront.shared.errors import ModelError

__all__ = ["in_config", "in_gguf"]

# Hugging Face's names.
_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Where config.json says it.
_KEYS = ("hidden_act", "activation_function", "activation")
# Families whose own code computes this, whatever `hidden_act` says: TurboSparse, SparseLM, GGUF files of ProSparse and
# gpt-oss.
_BY_FAMILY = {
    "bamboo": "drelu",
    "turbosparsemixtral": "drelu",
    "llama_sparse_relu": "relu",
    "prosparse-llama": "fatrelu:0.01",
    "gpt-oss": "swiglu_oai:7.0",
}
# Families whose config says it under another key.
_HIDDEN_ACTIVATION = ("gemma2", "gemma3", "gemma3_text")
# What a family has where its files say nothing; SiLU is that of the others.
_USUAL = dict.fromkeys(("gemma", *_HIDDEN_ACTIVATION, "gpt2", "starcoder2"), "gelu_tanh") | {
    "opt": "relu",
    "falcon": "gelu",
    "nemotron": "relu2",
    "smallthinker": "relu",
}
# Words in the names of sparse models that were converted as if they were of the family they come from.
_BY_NAME = {
    "minicpms": "fatrelu:0.03",
    "prosparseminicpm": "fatrelu:0.03",
    "prosparse": "fatrelu:0.01",
    "relullama": "relu",
    "relufalcon": "relu",
    "sparselm": "relu",
    "bamboo": "drelu",
    "turbosparse": "drelu",
    "sparseqwen": "drelu",
}
# Families of which sparse models have been published; their usual activation is SiLU.
_CONVERTED = ("llama", "mistral", "qwen2", "minicpm")
_UNSAID = ("silu", "relu", "drelu")


def in_config(config: Fields) -> tuple[str, ...]:
    """The plausible activations by config.json. Raises ModelError for one that is not supported."""
    family = config.text("model_type")
    if family in _BY_FAMILY:
        return (_BY_FAMILY[family],)
    if family == "gpt_oss":
        return (f"swiglu_oai:{config.positive('swiglu_limit', 7.0)!r}",)
    keys = ("hidden_activation",) if family in _HIDDEN_ACTIVATION else _KEYS
    key = next((key for key in keys if key in config), None)
    if key is None:
        return _UNSAID if family in _CONVERTED else (_USUAL.get(family, "silu"),)
    said = config.text(key)
    if said == "fatrelu":
        return (f"fatrelu:{config.number('hidden_act_param')!r}",)
    if said not in _NAMES:
        known = ", ".join((*_NAMES, "fatrelu"))
        raise ModelError(f"{config.path.parent}: activation '{said}' is not supported; {known} are")
    if family == "qwen2" and said == "relu":
        return "drelu", "relu"  # SparseQwen2 says relu and means dReLU; what transformers makes of it is relu
    if family == "gemma" and said == "gelu":
        return (_USUAL[family],)  # so the first Gemma's files call the approximation
    return (_NAMES[said],)


def in_gguf(fields: Fields, dialect: str) -> tuple[str, ...]:
    """The plausible activations of a GGUF file, which has no field for it; `dialect`: see `gguf.config.Found`."""
    family = fields.text("general.architecture")
    name = "".join(filter(str.isalnum, fields.text("general.name", fields.path.stem).lower()))
    named = next((activation for word, activation in _BY_NAME.items() if word in name), None)
    if family in _BY_FAMILY:
        return (_BY_FAMILY[family],)
    if dialect == "sparkinfer":
        return ("drelu" if family == "qwen2" else named or "relu",)
    if dialect == "powerinfer":
        return (named or "relu",)
    usual = _USUAL.get(family, "silu")
    if fields.path == default_file():
        return (usual,)
    if family not in _CONVERTED or fields.count(f"{family}.expert_count", 0, low=0) > 0:
        return (named or usual,)
    return (named, "silu") if named else _UNSAID
