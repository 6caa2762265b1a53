"""In which ways a run reads rows of weights: what the machine is measured for before it starts."""

from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.shared.kernels.fetching import (
    BUNDLES,
    CACHED_TILES,
    GATE_ROWS,
    LOWBIT_ROWS,
    MATRIX_ROWS,
    SCATTERED,
    Use,
)
from warmfront.shared.model.store import PackedModel

__all__ = ["uses_of"]


def uses_of(model: PackedModel, plan: RunPlan) -> list[Use]:
    """What decoding reads, as `plan` runs `model`."""
    neurons = {"all": [BUNDLES], "exact": [GATE_ROWS, SCATTERED]}.get(plan.selector, [SCATTERED])
    uses = {Use(access, int(model.layout.gate_kind)) for access in neurons}
    if plan.attention == "cpu":
        roles = {"q", "k", "v", "o", "head" if "head" in model.entries else "embed"}
        uses.add(Use(CACHED_TILES, int(plan.cache_kind)))
        if plan.selector == "lowrank":
            roles |= {"fc1", "fc2"}
        if plan.selector == "lowbit":
            uses.add(Use(LOWBIT_ROWS, plan.config.bits))
        for name, entry in model.entries.items():
            if name.rpartition(".")[2] in roles and entry.kind is not None:
                uses.add(Use(MATRIX_ROWS, int(entry.kind)))
    return sorted(uses)
