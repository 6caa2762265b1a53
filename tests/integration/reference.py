"""Hugging Face transformers in float32, the reference of the equality and quality tests."""

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from warmfront.coordinator.models.families import FAMILIES
from warmfront.coordinator.models.family import pair_order
from warmfront.coordinator.models.open import open_source
from warmfront.shared.model.branches import bounds_of, branches_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import row_bytes, unpack
from warmfront.shared.model.store import PackedModel
from warmfront.shared.model.tensors import file_shapes

Floats = npt.NDArray[np.float32]

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_from_gguf(path: Path) -> Any:
    """The model of a GGUF file with tied embeddings, each weight dequantised to float32."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: _dequantised(tensor) for tensor in reader.tensors}

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tensors["token_embd.weight"]),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=field("context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
    )
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for layer, (ours, theirs) in itertools.product(range(config.num_hidden_layers), GGUF_NAMES.items()):
        values = tensors[f"blk.{layer}.{theirs}.weight"]
        if theirs in ("attn_q", "attn_k"):
            values = _halves(values, heads if theirs == "attn_q" else kv_heads)
        state[f"model.layers.{layer}.{ours}.weight"] = values
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict({name: torch.from_numpy(v) for name, v in state.items()}, strict=False)
    assert list(missing) == ["lm_head.weight"]
    assert not unexpected
    model.tie_weights()
    return model.eval()


def llama_from_folder(path: Path) -> Any:
    """The model of a Hugging Face folder, a Llama or another family, widened to float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


def model_from_packed(folder: Path, packed: PackedModel) -> Any:
    """The folder's model with the weights of its packed file, each as it was rounded there, widened to float32."""
    spec, family, source = packed.spec, FAMILIES[packed.spec.family], open_source(folder)
    parts: dict[str, list[Floats]] = {}
    for name, shape in file_shapes(spec):
        # Vectors are not rounded.
        values = _unpacked(packed, name, shape) if len(shape) == 2 else source.tensor(name).float32()
        order = pair_order(spec, name)
        if order is not None:
            heads = values.reshape(-1, len(order), *shape[1:])
            values = heads[:, np.argsort(order)].reshape(shape)
        if family.norms_plus_one and name.endswith("norm"):
            values = values - 1
        published = family.hf_name(name).replace("correction.bias", "correction_bias")
        parts.setdefault(published, []).append(values)
    # As a folder: in memory, transformers has experts in stacks.
    with TemporaryDirectory() as place:
        shutil.copy(folder / "config.json", place)
        state = {name: np.concatenate(pieces) for name, pieces in parts.items()}
        state = _in_turns(state) if family.hf_in_turns else state
        save_file(state, Path(place) / "model.safetensors", {"format": "pt"})
        model, found = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    assert set(found["missing_keys"]) <= ({"lm_head.weight"} if spec.architecture.tied_head else set())
    assert not found["unexpected_keys"]
    return model.eval()


def _unpacked(packed: PackedModel, name: str, shape: tuple[int, ...]) -> Floats:
    """A tensor of the packed file by the name and in the shape of `tensors.py`."""
    layer, _, part = name.rpartition(".")
    if part in ("gate", "up", "down"):
        layout = packed.layout
        start, kind = layout.place_of(part)
        _, number, *branch = layer.split(".")
        firsts = zip(branches_of(packed.spec), bounds_of(packed.spec).tolist(), strict=False)
        # Not found: a layer of a mixture that has no experts.
        at = next((GROUP * group for (prefix, _), group in firsts if prefix == "".join(f"{w}." for w in branch)), 0)
        groups = packed.bytes_of(f"layers.{number}.ffn").reshape(-1, layout.group_bytes)
        bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
        bundles = bundles[at : at + shape[part == "down"]]
        rows = unpack(bundles[:, start : start + row_bytes(kind, layout.hidden)], kind, layout.hidden)
        return np.ascontiguousarray(rows.T if part == "down" else rows)
    entry = packed.entries[name.replace("shared_router", "router")]
    assert entry.kind is not None
    rows = unpack(packed.bytes_of(name.replace("shared_router", "router")).reshape(entry.shape), entry.kind, shape[1])
    experts = packed.spec.architecture.feed_forward.experts
    first = experts.number if part == "shared_router" and experts is not None else 0
    return rows[first : first + shape[0]]


def _in_turns(state: dict[str, Floats]) -> dict[str, Floats]:
    """The experts of a gpt-oss in stacks, in which gates and ups take turns; and its sinks by their name."""
    stacks: dict[str, list[Floats]] = {}
    made: dict[str, Floats] = {}
    for name, values in state.items():
        match = re.fullmatch(r"(.*\.experts\.)\d+\.(\w+)_proj\.(weight|bias)", name)
        if match is None:
            made[name.removesuffix(".weight") if name.endswith(".sinks.weight") else name] = values
        else:
            suffix = "_bias" if match[3] == "bias" else ""
            stacks.setdefault(f"{match[1]}{match[2]}_proj{suffix}", []).append(values)
    for name, rows in stacks.items():
        if "gate_proj" in name:
            turns = np.stack((rows, stacks[name.replace("gate", "up")]), axis=2)
            rows, name = turns.reshape(len(rows), -1, *turns.shape[3:]), name.replace("gate", "gate_up")
        elif "up_proj" in name:
            continue
        stack = np.asarray(rows)
        made[name] = np.ascontiguousarray(stack.swapaxes(1, 2)) if stack.ndim == 3 else stack
    return made


def _dequantised(tensor: gguf.ReaderTensor) -> Floats:
    shape = [int(size) for size in reversed(tensor.shape)]
    values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return np.array(values, np.float32)


def _halves(values: Floats, heads: int) -> Floats:
    """GGUF's neighbouring rows of a RoPE pair as transformers' halves of a head."""
    pairs = values.reshape(heads, len(values) // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))


@torch.inference_mode()
def all_logits(model: Any, ids: Sequence[int]) -> Floats:
    """float32 [len(ids), vocab]: the logits after each token of `ids`."""
    return np.asarray(model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy(), np.float32)


def choices(model: Any, ids: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The most probable token after `ids`, and after each token of `answer` that follows: len(answer) + 1 of them.

    An answer is the greedy one exactly if it is what was chosen at every step.
    """
    logits = all_logits(model, [*ids, *answer])
    return [int(token) for token in logits[len(ids) - 1 :].argmax(1)]
