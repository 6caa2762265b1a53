"""The families of models: each has a row that maps its files' settings and tensor names to ours.

A new family is a row here, and functions in `hf/config.py` and `gguf/config.py` where its keys differ from others'.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.gguf import config as gguf_config
from warmfront.coordinator.models.gguf.config import Found
from warmfront.coordinator.models.hf import config as hf_config
from warmfront.coordinator.models.rope import Doubles
from warmfront.shared.model.architecture import Positions
from warmfront.shared.model.spec import ModelSpec

__all__ = ["FAMILIES", "Family", "supported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the models of one family are read.

    Positions are read last: a rotary table is as long as the settings say, so the tensors must confirm the sizes first.
    """

    # The description but for positions, from config.json and the model's name.
    hf: Callable[[Fields, str], ModelSpec]
    hf_positions: Callable[[Fields, ModelSpec], Positions]
    # The same from a GGUF file's fields and what else is in it.
    gguf: Callable[[Fields, Found], ModelSpec]
    # The last argument divides the frequencies: one number for each, from a tensor of the file, or 1.
    gguf_positions: Callable[[Fields, ModelSpec, Doubles | float], Positions]
    # By the last word of our name (`tensors.py`): Hugging Face's name and GGUF's, without ".weight" or ".bias".
    tensors: Mapping[str, tuple[str, str]]

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of the tensor that `tensors.py` calls `name`."""
        *layer, part = name.removesuffix(".bias").split(".")
        published = self.tensors[part][0].format(i=layer[-1] if layer else "")
        return published + (".bias" if name.endswith(".bias") else ".weight")


_LLAMA = Family(
    hf=hf_config.llama,
    hf_positions=hf_config.rotary,
    gguf=gguf_config.llama,
    gguf_positions=gguf_config.rotary,
    tensors={
        "embed": ("model.embed_tokens", "token_embd"),
        "head": ("lm_head", "output"),
        "norm": ("model.norm", "output_norm"),
        "attn_norm": ("model.layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
        "q": ("model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
        "k": ("model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
        "v": ("model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
        "o": ("model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
        "ffn_norm": ("model.layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
        "gate": ("model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
        "up": ("model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
        "down": ("model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
    },
)
# By model_type of config.json, which is general.architecture of GGUF, where a Mistral is a "llama".
FAMILIES = {"llama": _LLAMA, "mistral": replace(_LLAMA, hf=hf_config.mistral)}


def supported() -> str:
    """The end of a message that refuses another family: "llama is"."""
    return f"{', '.join(FAMILIES)} {'is' if len(FAMILIES) == 1 else 'are'}"
