"""What the tensors of tests' GGUF files are called, and how exactly each type is kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.formats import Kind

Floats = npt.NDArray[np.float32]
Make = Callable[..., Path]
NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "layers.0.attn_norm": "blk.0.attn_norm",
    "layers.0.q": "blk.0.attn_q",
    "layers.0.k": "blk.0.attn_k",
    "layers.0.v": "blk.0.attn_v",
    "layers.0.o": "blk.0.attn_output",
    "layers.0.ffn_norm": "blk.0.ffn_norm",
    "layers.0.gate": "blk.0.ffn_gate",
    "layers.0.up": "blk.0.ffn_up",
    "layers.0.down": "blk.0.ffn_down",
}
EXACT = {
    "F32": Kind.F32,
    "F16": Kind.F16,
    "BF16": Kind.BF16,
    "Q8_0": Kind.Q8,
    "MXFP4": Kind.Q8,
    "Q4_0": Kind.Q4S,
    "Q4_1": Kind.Q4,
}
ROUNDED = {
    "Q5_0": Kind.Q8,
    "Q5_1": Kind.Q8,
    "Q5_K": Kind.Q8,
    "Q6_K": Kind.Q8,
    "Q2_K": Kind.Q4,
    "Q3_K": Kind.Q4,
    "IQ4_NL": Kind.Q4,
}


def bound(values: Floats, kind: Kind) -> Floats:
    """Half a step of the 32-blocks' grid, and what rounding scales to float16 adds."""
    blocks = values.reshape(len(values), -1, 32)
    reach = np.abs(blocks).max(2) if kind == Kind.Q8 else blocks.max(2) - blocks.min(2)
    half_step = reach / (254 if kind == Kind.Q8 else 30)
    slack = (np.abs(blocks).max(2) + reach) * 2**-10
    return np.broadcast_to((half_step + slack)[:, :, None], blocks.shape).reshape(values.shape)
