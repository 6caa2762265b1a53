"""The coordinator: attention, sampling, placement, supervision of the workers, the CLI and the Python API."""

from typing import TYPE_CHECKING, Any

from warmfront.shared.offload import OffloadStrategy

if TYPE_CHECKING:
    from warmfront.coordinator.engine.engine import Engine as Engine

__all__ = ["Engine", "OffloadStrategy"]


def __getattr__(name: str) -> Any:
    """Import the engine on first use: `warmfront --help` must not pay for numba."""
    if name == "Engine":
        from warmfront.coordinator.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
