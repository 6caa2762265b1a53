"""The families of models: each has a row that maps its files' settings and tensor names to ours.

A new family is a row here, and functions in `hf/config.py` and `gguf/config.py` where its keys differ from others'.
"""

import difflib
from dataclasses import replace

from warmfront.coordinator.models.described import positions_of
from warmfront.coordinator.models.family import Family
from warmfront.coordinator.models.gguf import config as gguf_config
from warmfront.coordinator.models.gguf import mixtures as gguf_mixtures
from warmfront.coordinator.models.gguf import ungated as gguf_ungated
from warmfront.coordinator.models.hf import config as hf_config
from warmfront.coordinator.models.hf import mixtures as hf_mixtures
from warmfront.coordinator.models.hf import ungated as hf_ungated

__all__ = ["FAMILIES", "supported"]

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
    gguf_pairs=True,
)
_QK_NORMS = {
    "q_norm": ("model.layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"),
    "k_norm": ("model.layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"),
}
_OUTPUT_NORMS = {
    "attn_post_norm": ("model.layers.{i}.post_attention_layernorm", "blk.{i}.post_attention_norm"),
    "ffn_post_norm": ("model.layers.{i}.post_feedforward_layernorm", "blk.{i}.post_ffw_norm"),
}
_QKV = ("model.layers.{i}.self_attn.qkv_proj", "blk.{i}.attn_qkv")
_GATE_UP = ("model.layers.{i}.mlp.gate_up_proj", "blk.{i}.ffn_up")
_QWEN2 = replace(_LLAMA, hf=hf_config.qwen2, gguf_pairs=False)
_QWEN3 = replace(_QWEN2, hf=hf_config.qwen3, tensors={**_LLAMA.tensors, **_QK_NORMS})
_GEMMA = replace(_LLAMA, hf=hf_config.gemma, gguf=gguf_config.gemma, gguf_pairs=False, norms_plus_one=True)
_GEMMA2 = replace(
    _GEMMA,
    hf=hf_config.gemma2,
    gguf=gguf_config.gemma2,
    tensors={
        **_LLAMA.tensors,
        **_OUTPUT_NORMS,
        "ffn_norm": ("model.layers.{i}.pre_feedforward_layernorm", "blk.{i}.ffn_norm"),
    },
)
_GEMMA3 = replace(
    _GEMMA2,
    hf=hf_config.gemma3,
    hf_positions=hf_config.gemma3_rotary,
    gguf=gguf_config.gemma3,
    gguf_positions=gguf_config.gemma3_rotary,
    tensors={**_GEMMA2.tensors, **_QK_NORMS},
)
_PHI3 = replace(
    _LLAMA,
    hf=hf_config.mistral,
    gguf_pairs=False,
    tensors={**_LLAMA.tensors, "q": _QKV, "k": _QKV, "v": _QKV, "gate": _GATE_UP, "up": _GATE_UP},
)
_OLMO2 = replace(
    _LLAMA,
    hf=hf_config.olmo2,
    gguf=gguf_config.olmo2,
    gguf_pairs=False,
    tensors={
        **{part: names for part, names in _LLAMA.tensors.items() if part not in ("attn_norm", "ffn_norm")},
        **_OUTPUT_NORMS,
        **_QK_NORMS,
    },
)
_STABLELM = replace(
    _LLAMA, hf=hf_config.stablelm, hf_positions=hf_config.quarter_rotary, gguf=gguf_config.stablelm, gguf_pairs=False
)
_OPT = Family(
    hf=hf_ungated.opt,
    hf_positions=positions_of,
    gguf=gguf_ungated.opt,
    gguf_positions=positions_of,
    tensors={
        "embed": ("model.decoder.embed_tokens", "token_embd"),
        "head": ("lm_head", "output"),
        "positions": ("model.decoder.embed_positions", "position_embd"),
        "norm": ("model.decoder.final_layer_norm", "output_norm"),
        "attn_norm": ("model.decoder.layers.{i}.self_attn_layer_norm", "blk.{i}.attn_norm"),
        "attn_post_norm": ("model.decoder.layers.{i}.self_attn_layer_norm", "blk.{i}.attn_post_norm"),
        "q": ("model.decoder.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
        "k": ("model.decoder.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
        "v": ("model.decoder.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
        "o": ("model.decoder.layers.{i}.self_attn.out_proj", "blk.{i}.attn_output"),
        "ffn_norm": ("model.decoder.layers.{i}.final_layer_norm", "blk.{i}.ffn_norm"),
        "ffn_post_norm": ("model.decoder.layers.{i}.final_layer_norm", "blk.{i}.ffn_post_norm"),
        "up": ("model.decoder.layers.{i}.fc1", "blk.{i}.ffn_up"),
        "down": ("model.decoder.layers.{i}.fc2", "blk.{i}.ffn_down"),
    },
    hf_projections=("model.decoder.project_in", "model.decoder.project_out"),
)
_FALCON_QKV = ("transformer.h.{i}.self_attention.query_key_value", "blk.{i}.attn_qkv")
_FALCON_NAMES = {
    "embed": ("transformer.word_embeddings", "token_embd"),
    "head": ("lm_head", "output"),
    "norm": ("transformer.ln_f", "output_norm"),
    "attn_norm": ("transformer.h.{i}.input_layernorm", "blk.{i}.attn_norm"),
    "q": _FALCON_QKV,
    "k": _FALCON_QKV,
    "v": _FALCON_QKV,
    "o": ("transformer.h.{i}.self_attention.dense", "blk.{i}.attn_output"),
    "ffn_norm": ("transformer.h.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    "up": ("transformer.h.{i}.mlp.dense_h_to_4h", "blk.{i}.ffn_up"),
    "down": ("transformer.h.{i}.mlp.dense_4h_to_h", "blk.{i}.ffn_down"),
}
_FALCON_40B_NORMS = {
    "attn_norm": ("transformer.h.{i}.ln_attn", "blk.{i}.attn_norm_2"),
    "ffn_norm": ("transformer.h.{i}.ln_mlp", "blk.{i}.attn_norm"),
}
_FALCON = Family(
    hf=hf_ungated.falcon,
    hf_positions=hf_config.rotary,
    gguf=gguf_ungated.falcon,
    gguf_positions=gguf_config.rotary,
    tensors=_FALCON_NAMES,
    variant=("attn_norm", _FALCON_NAMES | _FALCON_40B_NORMS),
    hf_grouped=True,
)
_GPT2_QKV = ("transformer.h.{i}.attn.c_attn", "blk.{i}.attn_qkv")
_GPT2 = Family(
    hf=hf_ungated.gpt2,
    hf_positions=positions_of,
    gguf=gguf_ungated.gpt2,
    gguf_positions=positions_of,
    tensors={
        "embed": ("transformer.wte", "token_embd"),
        "head": ("lm_head", "output"),
        "positions": ("transformer.wpe", "position_embd"),
        "norm": ("transformer.ln_f", "output_norm"),
        "attn_norm": ("transformer.h.{i}.ln_1", "blk.{i}.attn_norm"),
        "q": _GPT2_QKV,
        "k": _GPT2_QKV,
        "v": _GPT2_QKV,
        "o": ("transformer.h.{i}.attn.c_proj", "blk.{i}.attn_output"),
        "ffn_norm": ("transformer.h.{i}.ln_2", "blk.{i}.ffn_norm"),
        "up": ("transformer.h.{i}.mlp.c_fc", "blk.{i}.ffn_up"),
        "down": ("transformer.h.{i}.mlp.c_proj", "blk.{i}.ffn_down"),
    },
    hf_turned=True,
)
_UNGATED_NAMES = {part: names for part, names in _LLAMA.tensors.items() if part != "gate"}
_NEMOTRON = replace(
    _LLAMA,
    hf=hf_ungated.nemotron,
    gguf=gguf_ungated.plain,
    tensors=_UNGATED_NAMES,
    gguf_pairs=False,
    norms_plus_one=True,
)
_STARCODER2 = replace(
    _LLAMA,
    hf=hf_ungated.starcoder2,
    gguf=gguf_ungated.plain,
    tensors={
        **_UNGATED_NAMES,
        "up": ("model.layers.{i}.mlp.c_fc", "blk.{i}.ffn_up"),
        "down": ("model.layers.{i}.mlp.c_proj", "blk.{i}.ffn_down"),
    },
    gguf_pairs=False,
)
_NEURONS = ("gate", "up", "down")
_WITHOUT_NEURONS = {part: names for part, names in _LLAMA.tensors.items() if part not in _NEURONS}
# Of layers without experts.
_DENSE_NAMES = {part: _LLAMA.tensors[part] for part in _NEURONS}
_EXPERT_NAMES = {
    **_WITHOUT_NEURONS,
    "router": ("model.layers.{i}.mlp.gate", "blk.{i}.ffn_gate_inp"),
    "experts.gate": ("model.layers.{i}.mlp.experts.{e}.gate_proj", "blk.{i}.ffn_gate_exps"),
    "experts.up": ("model.layers.{i}.mlp.experts.{e}.up_proj", "blk.{i}.ffn_up_exps"),
    "experts.down": ("model.layers.{i}.mlp.experts.{e}.down_proj", "blk.{i}.ffn_down_exps"),
}
_SHARED_EXPERT_NAMES = {
    "shared_router": ("model.layers.{i}.mlp.shared_expert_gate", "blk.{i}.ffn_gate_inp_shexp"),
    "shared.gate": ("model.layers.{i}.mlp.shared_expert.gate_proj", "blk.{i}.ffn_gate_shexp"),
    "shared.up": ("model.layers.{i}.mlp.shared_expert.up_proj", "blk.{i}.ffn_up_shexp"),
    "shared.down": ("model.layers.{i}.mlp.shared_expert.down_proj", "blk.{i}.ffn_down_shexp"),
}
_QWEN2_MOE = replace(
    _QWEN2,
    hf=hf_mixtures.qwen2_moe,
    gguf=gguf_mixtures.mixture,
    tensors={**_EXPERT_NAMES, **_SHARED_EXPERT_NAMES, **_DENSE_NAMES},
)
_QWEN3_MOE = replace(
    _QWEN2,
    hf=hf_mixtures.qwen3_moe,
    gguf=gguf_mixtures.normalised_mixture,
    tensors={**_EXPERT_NAMES, **_QK_NORMS, **_DENSE_NAMES},
)
_MIXTRAL = replace(
    _LLAMA,
    hf=hf_mixtures.mixtral,
    gguf=gguf_mixtures.normalised_mixture,
    tensors={
        **_EXPERT_NAMES,
        "router": ("model.layers.{i}.block_sparse_moe.gate", "blk.{i}.ffn_gate_inp"),
        "experts.gate": ("model.layers.{i}.block_sparse_moe.experts.{e}.w1", "blk.{i}.ffn_gate_exps"),
        "experts.up": ("model.layers.{i}.block_sparse_moe.experts.{e}.w3", "blk.{i}.ffn_up_exps"),
        "experts.down": ("model.layers.{i}.block_sparse_moe.experts.{e}.w2", "blk.{i}.ffn_down_exps"),
    },
)
_GLM4_MOE = replace(
    _QWEN2,
    hf=hf_mixtures.glm4_moe,
    gguf=gguf_mixtures.glm4moe,
    tensors={
        **_EXPERT_NAMES,
        **_QK_NORMS,
        **_DENSE_NAMES,
        "ffn_norm": ("model.layers.{i}.post_attention_layernorm", "blk.{i}.post_attention_norm"),
        "correction": ("model.layers.{i}.mlp.gate.e_score_correction", "blk.{i}.exp_probs_b"),
        "shared.gate": ("model.layers.{i}.mlp.shared_experts.gate_proj", "blk.{i}.ffn_gate_shexp"),
        "shared.up": ("model.layers.{i}.mlp.shared_experts.up_proj", "blk.{i}.ffn_up_shexp"),
        "shared.down": ("model.layers.{i}.mlp.shared_experts.down_proj", "blk.{i}.ffn_down_shexp"),
    },
)
_SMALLTHINKER = replace(
    _LLAMA,
    hf=hf_mixtures.smallthinker,
    hf_positions=hf_mixtures.smallthinker_rotary,
    gguf=gguf_mixtures.smallthinker,
    gguf_positions=gguf_mixtures.smallthinker_rotary,
    gguf_pairs=False,
    tensors={
        **_EXPERT_NAMES,
        "router": ("model.layers.{i}.block_sparse_moe.primary_router", "blk.{i}.ffn_gate_inp"),
        "experts.gate": ("model.layers.{i}.block_sparse_moe.experts.{e}.gate", "blk.{i}.ffn_gate_exps"),
        "experts.up": ("model.layers.{i}.block_sparse_moe.experts.{e}.up", "blk.{i}.ffn_up_exps"),
        "experts.down": ("model.layers.{i}.block_sparse_moe.experts.{e}.down", "blk.{i}.ffn_down_exps"),
    },
)
_GPT_OSS = replace(
    _QWEN2,
    hf=hf_mixtures.gpt_oss,
    gguf=gguf_mixtures.gpt_oss,
    gguf_positions=gguf_mixtures.gpt_oss_rotary,
    tensors={
        **_EXPERT_NAMES,
        "router": ("model.layers.{i}.mlp.router", "blk.{i}.ffn_gate_inp"),
        "sinks": ("model.layers.{i}.self_attn.sinks", "blk.{i}.attn_sinks"),
        "ffn_norm": ("model.layers.{i}.post_attention_layernorm", "blk.{i}.post_attention_norm"),
    },
    hf_in_turns=True,
)
# By model_type of config.json, and by general.architecture of GGUF, which is the same for most, but a Mistral is a
# "llama" there, and so is a Mixtral.
FAMILIES = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, hf=hf_config.mistral),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi3": _PHI3,
    "olmo2": _OLMO2,
    "stablelm": _STABLELM,
    "opt": _OPT,
    "falcon": _FALCON,
    "gpt2": _GPT2,
    "nemotron": _NEMOTRON,
    "starcoder2": _STARCODER2,
    "granite": replace(_LLAMA, hf=hf_config.granite, gguf=gguf_config.granite),
    "mixtral": _MIXTRAL,
    "olmoe": replace(_QWEN3_MOE, hf=hf_mixtures.olmoe, gguf=gguf_mixtures.mixture),
    "qwen2_moe": _QWEN2_MOE,
    "qwen2moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3moe": _QWEN3_MOE,
    "glm4_moe": _GLM4_MOE,
    "glm4moe": _GLM4_MOE,
    "smallthinker": _SMALLTHINKER,
    "gpt_oss": _GPT_OSS,
    "gpt-oss": _GPT_OSS,
    # Sparse models with families of their own: ProSparse, TurboSparse, SparseLM.
    "sparsellama": _LLAMA,
    "prosparse-llama": _LLAMA,
    "bamboo": replace(_LLAMA, hf=hf_config.mistral),
    "turbosparsemixtral": _MIXTRAL,
    "llama_sparse_relu": _LLAMA,
    "minicpm": replace(_LLAMA, hf=hf_config.minicpm, gguf=gguf_config.minicpm),
}


# What families that are not in the table have, by the same names, and nothing here computes yet.
_HEAD_BIAS = "a bias of the head"
_OTHER_EXPERTS = "a mixture of experts (MoE) of its own kind"
_LATENT = "multi-head latent attention (MLA)"
_GEMMA3N = "embeddings of each layer, several residuals, and gates cut off at a quantile"
_MISSING = {
    "phi": _HEAD_BIAS,
    "phi2": _HEAD_BIAS,
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "bitnet": "a norm within the feed-forward",
    "phimoe": _OTHER_EXPERTS,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek2": _LATENT,
    "glm4_moe_lite": _LATENT,
}


def supported(name: str) -> str:
    """The end of a message that refuses the family `name`: what it has that is missing here, and what there is."""
    missing = f": it has {_MISSING[name]}" if name in _MISSING else ""
    near = difflib.get_close_matches(name, FAMILIES, 1)
    return f"{missing}; {', '.join(FAMILIES)} are" + (f" (did you mean {near[0]}?)" if near and not missing else "")
