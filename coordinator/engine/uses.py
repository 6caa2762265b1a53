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
from warmfront.shared.selector import Source, Work

__all__ = ["uses_of"]

_NEURONS = {Work.DENSE: [BUNDLES], Work.GATES: [GATE_ROWS, SCATTERED], Work.MASK: [SCATTERED]}


def uses_of(model: PackedModel, plan: RunPlan) -> list[Use]:
    """What decoding reads, as `plan` runs `model`."""
    uses = {Use(access, int(model.layout.gate_kind)) for access in _NEURONS[plan.selector.work]}
    if plan.attention == "cpu":
        roles = {"q", "k", "v", "o", "head" if "head" in model.entries else "embed"}
        uses.add(Use(CACHED_TILES, int(plan.cache_kind)))
        if Source.LOWRANK in plan.selector.sources:
            roles |= {"fc1", "fc2"}
        if Source.LOWBIT in plan.selector.sources:
            uses.add(Use(LOWBIT_ROWS, plan.config.bits))
        for name, entry in model.entries.items():
            if name.rpartition(".")[2] in roles and entry.kind is not None:
                uses.add(Use(MATRIX_ROWS, int(entry.kind)))
    return sorted(uses)
