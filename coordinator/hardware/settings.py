"""What `warmfront tune` found for this machine, a model and its weight type: kept in one file and used by default.

{"<key>": {"workers": 1, "threads": 2, "coordinator_threads": 2, "spins": 100, "tok_s": 123.4}, ...}
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.files import locked, write_whole
from warmfront.shared.machine.core_plan import plan_cores
from warmfront.shared.machine.topology import Topology, read_topology
from warmfront.shared.paths import cache_root

__all__ = ["Setting", "keep_setting", "kept_setting", "tuned", "tuning_file"]


class Setting(NamedTuple):
    """What is tuned; the names are those of `EngineConfig`."""

    workers: int  # processes
    threads: int  # of all workers together
    coordinator_threads: int
    spins: int  # rounds at a barrier

    def __str__(self) -> str:
        each = self.threads / self.workers
        return f"{self.workers} x {each:g} threads, {self.coordinator_threads} of the coordinator, {self.spins} spins"


def tuning_file() -> Path:
    """The file of the settings."""
    return cache_root() / "tuning.json"


def _key(model: Path, topology: Topology) -> str:
    """The key of a packed model (by its name, which includes the weight type) and of the machine that we may use."""
    nodes = [(node.id, node.cores, node.total_bytes >> 28) for node in topology.nodes]
    digest = hashlib.sha256(repr((nodes, topology.quota)).encode()).hexdigest()[:12]
    return f"{model.stem}@{digest}"


def _kept() -> dict[str, dict[str, float]]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(tuning_file().read_bytes())
        if isinstance(kept, dict):
            return kept
    return {}


def kept_setting(model: Path) -> Setting | None:
    """The setting for the packed model at `model`; None if there is none, or the file is damaged."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        kept = _kept()[_key(model, read_topology())]
        setting = Setting(*(int(kept[name]) for name in Setting._fields))
        if min(setting[:3]) >= 1 and setting.spins >= 0:
            return setting
    return None


def keep_setting(model: Path, setting: Setting, tok_s: float) -> None:
    """Keep a setting for `tuned`. Raises OSError if the cache cannot be written."""
    found = {_key(model, read_topology()): {**setting._asdict(), "tok_s": round(tok_s, 2)}}
    with locked(tuning_file()):
        write_whole(tuning_file(), (json.dumps(_kept() | found, indent=1) + "\n").encode())


def tuned(config: EngineConfig, model: Path, gpu: str | None, say: Callable[[str], None]) -> EngineConfig:
    """`config` with the setting for `model`, unless the user chose threads, wants no tuning, or uses a GPU."""
    chosen = (config.workers, config.threads, config.coordinator_threads, config.spins) != (None,) * 4
    if not config.tuning or chosen or config.force or gpu is not None:
        return config
    setting = kept_setting(model)
    if setting is None:
        return config
    try:
        plan_cores(read_topology(), **setting._asdict())
    except UsageError:
        say(f"what was tuned ({setting}) does not fit the cores of now: run `warmfront tune` again")
        return config
    say(f"as tuned: {setting}")
    return replace(config, **setting._asdict())
