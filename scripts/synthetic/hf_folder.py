"""The synthetic model as a Hugging Face folder, with the predictors in a file of their own."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

from synthetic.shape import NORM_EPS, PREDICTOR, ROPE_BASE, SPECIAL, Shape, tokens

__all__ = ["Safetensors", "open_hf"]

SAFETENSORS_TYPES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
NAMES = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "block_sparse_moe.gate",
}
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


class Safetensors:
    """A safetensors file that is written from its start to its end."""

    def __init__(
        self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], dtype: torch.dtype, metadata: dict[str, str]
    ) -> None:
        """`tensors`: by our name, the published name and the shape, in the order of writing."""
        self._names = list(tensors)
        self._dtype = dtype
        header: dict[str, Any] = {"__metadata__": metadata}
        self.nbytes = 0
        for name, shape in tensors.values():
            end = self.nbytes + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_TYPES[dtype],
                "shape": list(shape),
                "data_offsets": [self.nbytes, end],
            }
            self.nbytes = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: Tensor) -> None:
        """Write the tensor if this file has it."""
        if self._names and name == self._names[0]:
            self._names.pop(0)
            self._file.write(values.to(self._dtype).contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Close the file, whole or not."""
        self._file.close()


def open_hf(folder: Path, shape: Shape, dtype: torch.dtype) -> list[Safetensors]:
    """Write configuration and tokenizer; returns the weight files, which are still to be written."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "relu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab,
    }
    if shape.experts:
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "hidden_act": shape.expert_activation,
            "model_type": "mixtral",
            "num_experts_per_tok": shape.used,
            "num_local_experts": shape.experts,
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens(shape.vocab))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": shape.context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    model: dict[str, tuple[str, tuple[int, ...]]] = {}
    predictor: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, size in shape.tensors():
        if name.rpartition(".")[2] in PREDICTOR:
            predictor[name] = (f"{name}.weight", size)
        else:
            model[name] = (_published(name), size)
    how = {"input": "residual", "activation": "relu", "threshold": "0"}
    files = [Safetensors(folder / "model.safetensors", model, dtype, {"format": "pt"})]
    return [*files, Safetensors(folder / "predictor.safetensors", predictor, dtype, how)] if predictor else files


def _published(name: str) -> str:
    *layer, part = name.split(".")
    if not layer:
        return f"{NAMES[part]}.weight"
    if len(layer) > 2:
        return f"model.layers.{layer[1]}.block_sparse_moe.experts.{layer[3]}.{EXPERT[part]}.weight"
    return f"model.layers.{layer[1]}.{NAMES[part]}.weight"
