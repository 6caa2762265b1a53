"""Which CUDA devices the machine has, asked of the driver itself: no GPU package need be installed."""

import ctypes

__all__ = ["cuda_devices"]


def cuda_devices() -> int:
    """Number of CUDA devices; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
