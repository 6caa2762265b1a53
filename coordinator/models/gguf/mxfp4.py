"""MXFP4 of the OCP Microscaling formats: blocks of 32 codes of 4 bits that share a power of two, 2^(exponent - 127).

A code is a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6. Twice these are whole numbers of at most 12, so Q8 holds a block
exactly, in a scale of 2^(exponent - 128); what is below float16's powers of two, 2^-24, becomes 0.
How the codes lie in memory is the file format's: `blocks.py`, `hf/expert_stacks.py`.
"""

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.formats import BLOCK

__all__ = ["as_q8", "numbers"]

Bytes = npt.NDArray[np.uint8]

_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_BIAS = 128


def numbers(codes: Bytes, exponents: Bytes) -> npt.NDArray[np.float32]:
    """Codes [rows, blocks, 32] in 0..15 and exponents [rows, blocks] as float32 [rows, blocks * 32]."""
    powers = exponents.astype(np.int32) - _BIAS
    wide = np.ldexp(_TWICE[codes].astype(np.float32), powers[:, :, None])
    return np.asarray(wide.reshape(len(codes), -1), np.float32)


def as_q8(codes: Bytes, exponents: Bytes) -> Bytes:
    """The same as rows of Q8: uint8 [rows, row_bytes]. A scale too large for float16 becomes infinite."""
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS).astype(np.float16)
    whole = _TWICE[codes].view(np.uint8).reshape(len(codes), -1)
    assert codes.shape[2] == BLOCK
    return np.concatenate((whole, scales.view(np.uint8)), axis=1)
