"""Opening a device by its name. Its module is imported for it alone: CuPy or the kernels may be missing."""

from warmfront.gpu_worker.device import Device
from warmfront.shared.errors import ResourceError

__all__ = ["open_device"]


def open_device(name: str) -> Device:
    """The device called "host" or "cuda:N"; raises ResourceError if it is not there."""
    kind, _, index = name.partition(":")
    if name == "host":
        from warmfront.gpu_worker.host import HostDevice

        return HostDevice()
    if kind == "cuda" and index.isdecimal():
        from warmfront.gpu_worker.cuda import CudaDevice

        return CudaDevice(int(index))
    raise ResourceError(f"no device is called {name!r}: use cuda:N or host")
