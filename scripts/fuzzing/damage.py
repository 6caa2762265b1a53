"""Odd values, and damage to bytes whatever they mean."""

import random
import struct

__all__ = ["ODD_FLOATS", "ODD_INTS", "ODD_TEXTS", "damage_bytes", "odd_number"]

ODD_INTS = (0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ODD_FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e-45, 1e-30, 1e38)
ODD_TEXTS = (b"", b"\xff\xfe", b"a\nb\x1b[31m", "\U0001f642\u0301".encode(), b"llama", b"x" * 5000, b"../x", b"\0")


def damage_bytes(rng: random.Random, content: bytes, head: int) -> bytes:
    """Flip bits, write odd numbers, remove, repeat or insert a piece, or cut off the end; mostly before `head`."""
    out = bytearray(content)
    within = min(head, len(out)) if rng.random() < 0.7 else len(out)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(max(within, 1))
        what = rng.randrange(6)
        if what <= 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            out[at : at + 8] = struct.pack("<Q", rng.choice(ODD_INTS))
        elif what == 3:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif what == 4:
            out[at:at] = rng.choice((b"\0", rng.randbytes(8), bytes(out[at : at + 50])))
        else:
            del out[at:]
    return bytes(out)


def odd_number(rng: random.Random) -> bytes:
    """Four bytes that are an odd float32, or that hold NaN and infinity if read as float16."""
    return rng.choice((struct.pack("<f", rng.choice(ODD_FLOATS)), b"\0\x7e\0\x7c", b"\xff" * 4))
