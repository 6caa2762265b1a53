"""`python -m warmfront.gpu_worker.check INDEX PARENT`: whether a CUDA device computes neurons correctly, by trial.

A small layer is computed by the product's own kernels, a token alone and several together, and compared with numpy.
"""

import numpy as np

from warmfront.gpu_worker.cuda import CudaDevice
from warmfront.shared.machine.driver import answer, count_devices
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.panels import LANES, whole_panels

_HIDDEN, _GROUPS, _TOKENS = 64, 3, 17


def _against(index: int) -> str | None:
    if count_devices() == 0:
        return ""
    rng = np.random.default_rng(1)
    layout = BundleLayout(hidden=_HIDDEN, ffn=_GROUPS * GROUP, gate_kind=Kind.F16, down_kind=Kind.F16)
    gate, up, down = rng.normal(size=(3, layout.ffn, _HIDDEN)).astype(np.float16)
    groups = np.zeros((_GROUPS, layout.group_bytes), np.uint8)
    bundles = groups.reshape(layout.ffn, layout.bundle_bytes)
    for offset, rows in ((0, gate), (layout.up_offset, up), (layout.down_offset, down)):
        bundles[:, offset : offset + 2 * _HIDDEN] = rows.view(np.uint8)
    x = rng.normal(size=(_TOKENS, _HIDDEN)).astype(np.float32)
    wide = x.astype(np.float64)
    expected = (np.maximum(wide @ gate.T, 0) * (wide @ up.T)) @ down
    device, slots = CudaDevice(index), np.arange(_GROUPS, dtype=np.int32)
    try:
        device.reserve(layout, FeedForward(activation="relu"), _GROUPS, _TOKENS)
        device.fill(slots, groups)
        panels = np.zeros((whole_panels(_TOKENS) // LANES, _HIDDEN, LANES), np.float32)
        for token, row in enumerate(x):
            panels[token // LANES, :, token % LANES] = row
        one, several = np.empty((1, _HIDDEN), np.int64), np.empty(panels.shape, np.int64)
        inverse = np.full(whole_panels(_TOKENS), 2.0**30, np.float32)
        device.execute(slots, x[:1], inverse[:1], True, one)
        device.execute_many(slots, panels, inverse, _TOKENS, several)
        got = np.concatenate((one, several.swapaxes(1, 2).reshape(-1, _HIDDEN)[:_TOKENS])) / 2.0**30
        expected = np.concatenate((expected[:1], expected))
        if not np.allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
            return f"{device.name} computes wrong numbers"
    finally:
        device.close()
    return None


if __name__ == "__main__":
    answer(_against)
