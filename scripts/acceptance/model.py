"""A random ReLU Llama as a Hugging Face folder, with hot and cold neurons that change with the text's topic.

Channel 0 of the residual is the same for every token and channel 1 tells its topic; no layer writes them. A gate's
weights of these two are its bias: a fifth of the neurons fires often, the others rarely, all together a tenth of the
time, and which ones fire depends on the topic. Words of a topic are followed by words of the same topic.
"""

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

__all__ = ["Shape", "prompt", "write_model"]

_BIAS = 4.0  # value of the two channels; the others have a standard deviation of 1
_LEAN = 1.0  # how far a topic moves the threshold of a neuron, in standard deviations
_HOT, _HOT_RATE, _COLD_RATE = 0.2, 0.4, 0.025


class Shape(NamedTuple):
    """Sizes of the model; `head_dim` is 64."""

    hidden: int
    layers: int
    ffn: int
    vocab: int
    context: int = 1024


def prompt(shape: Shape, tokens: int, topic: int = 0) -> list[int]:
    """Token ids of a topic, 0 or 1."""
    return [(2 * (17 + 5 * i) + topic) % shape.vocab for i in range(tokens)]


def write_model(folder: Path, shape: Shape, dtype: type[np.floating[Any]]) -> None:
    """Write the model with weights of `dtype`."""
    rng = np.random.default_rng(7)
    hidden, ffn = shape.hidden, shape.ffn

    def matrix(rows: int, cols: int, deviation: float) -> npt.NDArray[np.float32]:
        return rng.standard_normal((rows, cols), np.float32) * np.float32(deviation / cols**0.5)

    topics = np.where(np.arange(shape.vocab) % 2, -1, 1).astype(np.float32)
    embed, head = rng.standard_normal((shape.vocab, hidden), np.float32), matrix(shape.vocab, hidden, 4)
    embed[:, 0], embed[:, 1] = _BIAS, _BIAS * topics
    head[:, 0], head[:, 1] = 0, 2 * topics
    ones = np.ones(hidden, np.float32)
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": head, "model.norm.weight": ones}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(hidden, hidden, 0.5 if name == "o" else 1)
        rates = np.where(rng.random(ffn) < _HOT, _HOT_RATE, _COLD_RATE)
        thresholds = np.array([NormalDist().inv_cdf(1 - rate) for rate in rates])
        gate, down = matrix(ffn, hidden, 1), matrix(hidden, ffn, 1)
        gate[:, 0] = -thresholds / _BIAS
        gate[:, 1] = rng.choice((-_LEAN, _LEAN), ffn) / _BIAS
        down[:2] = tensors[f"{at}self_attn.o_proj.weight"][:2] = 0
        tensors[f"{at}mlp.gate_proj.weight"], tensors[f"{at}mlp.down_proj.weight"] = gate, down
        tensors[f"{at}mlp.up_proj.weight"] = matrix(ffn, hidden, 1)
        tensors[f"{at}input_layernorm.weight"] = tensors[f"{at}post_attention_layernorm.weight"] = ones
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.array(tensor, dtype) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": shape.vocab,
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
