"""The balancing policies by name. To add one see `interface.py`."""

from collections.abc import Mapping

from warmfront.coordinator.balancing.balance import Balance
from warmfront.coordinator.balancing.baselines import ByLayer, ByPrompt, Core, Ema, EmaPublished, Lru, Static
from warmfront.coordinator.balancing.interface import Floats, Policy, PolicyClass
from warmfront.shared.errors import UsageError

__all__ = ["POLICIES", "make_policy"]

# The command line lists the same names without importing numpy: POLICIES in shared/config.py; a test compares the two.
_CLASSES: tuple[PolicyClass, ...] = (Balance, Static, ByLayer, ByPrompt, Lru, Ema, EmaPublished, Core)
POLICIES: Mapping[str, PolicyClass] = {each.name: each for each in _CLASSES}


def make_policy(name: str, long_run: Floats, group_bytes: int) -> Policy:
    """The policy of that name, made as `PolicyClass` says.

    Raises UsageError for an unknown name.
    """
    if name not in POLICIES:
        raise UsageError(f"no policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name](long_run, group_bytes)
