"""`python -m warmfront.coordinator.engine.devices.torch_check INDEX PARENT`: does torch compute rightly on CUDA?

The products and the attention that `torch_network.py` is made of, in its types, compared with float64 on the CPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from warmfront.shared.machine.driver import answer

# Relative to the largest value expected: inputs are rounded to so many bits.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM = 17, 4, 2, 32


def _layer(x: Tensor, weight: Tensor) -> Tensor:
    """Norm, product with the weights, causal attention among its columns: in the type of `weight`."""
    normed = rms_norm(x, (x.shape[-1],), None, 1e-5)
    joint = (normed.to(weight.dtype) @ weight.T).view(len(x), _HEADS + 2 * _KV_HEADS, _HEAD_DIM).transpose(0, 1)
    keys = joint[None, _HEADS : _HEADS + _KV_HEADS]
    seen = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
    return scaled_dot_product_attention(
        joint[None, :_HEADS], keys, joint[None, _HEADS + _KV_HEADS :], attn_mask=seen, enable_gqa=True
    )


def _against(index: int) -> str | None:
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return f"torch {torch.__version__} does not see cuda:{index}"
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_TOKENS, 64, generator=generator)
    weight = torch.randn((_HEADS + 2 * _KV_HEADS) * _HEAD_DIM, 64, generator=generator) / 8
    with torch.inference_mode():
        expected = _layer(x.double(), weight.double())
        for dtype, tolerance in _TOLERANCES.items():
            got = _layer(x.to(f"cuda:{index}"), weight.to(f"cuda:{index}", dtype)).cpu().double()
            if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
                return f"torch {torch.__version__} computes wrong numbers on cuda:{index}"
    return None


if __name__ == "__main__":
    answer(_against)
