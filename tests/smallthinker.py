"""SmallThinker for transformers, which does not have it: written for the tests, computed in float64."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class SmallThinkerConfig(PreTrainedConfig):
    """The settings of the published configurations."""

    model_type = "smallthinker"
    default_theta = 1.5e6

    vocab_size: int = 151936
    hidden_size: int = 1536
    num_hidden_layers: int = 32
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    rope_layout: list[int] | None = None
    sliding_window_layout: list[int] | None = None
    sliding_window_size: int = 4096
    moe_num_primary_experts: int = 32
    moe_num_active_primary_experts: int = 4
    moe_ffn_hidden_size: int = 768
    moe_primary_router_apply_softmax: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class _Norm(nn.Module):
    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * self.weight


def _matrix(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def _times(matrix: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, matrix.weight.double())


class _Attention(nn.Module):
    def __init__(self, config: SmallThinkerConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = _matrix(self.heads * self.dim, config.hidden_size)
        self.k_proj = _matrix(self.kv_heads * self.dim, config.hidden_size)
        self.v_proj = _matrix(self.kv_heads * self.dim, config.hidden_size)
        self.o_proj = _matrix(config.hidden_size, self.heads * self.dim)
        self.rotates = config.rope_layout is None or config.rope_layout[layer] == 1
        has_window = config.sliding_window_layout is not None and config.sliding_window_layout[layer] == 1
        self.window = config.sliding_window_size if has_window else None
        assert config.rope_parameters is not None
        self.theta = config.rope_parameters["rope_theta"]

    def forward(self, x: Tensor) -> Tensor:
        parts = ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        q, k, v = (_times(matrix, x).view(len(x), heads, self.dim).transpose(0, 1) for matrix, heads in parts)
        if self.rotates:
            q, k = self._rotated(q), self._rotated(k)
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, 0) for each in (k, v))
        own, other = torch.arange(len(x))[:, None], torch.arange(len(x))
        seen = (other <= own) if self.window is None else (other <= own) & (own - other < self.window)
        scores = (q @ k.mT * self.dim**-0.5).masked_fill(~seen, -torch.inf)
        return _times(self.o_proj, (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def _rotated(self, x: Tensor) -> Tensor:
        """Numbers j and j + dim / 2 of a head are a pair."""
        half = self.dim // 2
        angles = torch.outer(torch.arange(x.shape[1]).double(), self.theta ** -(torch.arange(half).double() / half))
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class _Expert(nn.Module):
    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.gate = _matrix(config.moe_ffn_hidden_size, config.hidden_size)
        self.up = _matrix(config.moe_ffn_hidden_size, config.hidden_size)
        self.down = _matrix(config.hidden_size, config.moe_ffn_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return _times(self.down, _times(self.gate, x).relu() * _times(self.up, x))


class _Mixture(nn.Module):
    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.primary_router = _matrix(config.moe_num_primary_experts, config.hidden_size)
        self.experts = nn.ModuleList(_Expert(config) for _ in range(config.moe_num_primary_experts))
        self.active, self.softmax = config.moe_num_active_primary_experts, config.moe_primary_router_apply_softmax

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        best = _times(self.primary_router, before).topk(self.active)
        weights = best.values.softmax(-1) if self.softmax else best.values.sigmoid()
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for token, (numbers, shares) in enumerate(zip(best.indices.tolist(), weights, strict=True)):
            for number, share in zip(numbers, shares, strict=True):
                out[token] += share * self.experts[number](x[token])
        return out


class _Layer(nn.Module):
    def __init__(self, config: SmallThinkerConfig, layer: int) -> None:
        super().__init__()
        self.self_attn, self.block_sparse_moe = _Attention(config, layer), _Mixture(config)
        self.input_layernorm, self.post_attention_layernorm = _Norm(config), _Norm(config)

    def forward(self, before: Tensor) -> Tensor:
        x = before + self.self_attn(self.input_layernorm(before))
        return x + self.block_sparse_moe(before, self.post_attention_layernorm(x))


class _Layers(nn.Module):
    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = _Norm(config)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids).double()
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class SmallThinkerForCausalLM(PreTrainedModel):
    """The model; of one text at a time, without a cache."""

    config_class = SmallThinkerConfig
    base_model_prefix = "model"

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__(config)
        self.model, self.lm_head = _Layers(config), _matrix(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        """The logits [1, tokens, vocab] of ids [1, tokens]."""
        return CausalLMOutput(logits=_times(self.lm_head, self.model(input_ids[0]))[None])


def register() -> None:
    """Make the Auto classes of transformers know it."""
    AutoConfig.register("smallthinker", SmallThinkerConfig)
    AutoModelForCausalLM.register(SmallThinkerConfig, SmallThinkerForCausalLM)
