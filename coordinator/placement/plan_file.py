"""The plan file: which groups of a model's neurons the GPU gets, as JSON that `warmfront plan` writes.

    format       "warmfront-plan-1"
    model        name of the model, as in its own file
    order        the name of the neurons' order to which the group numbers refer; empty: that of the original model
    vram_budget  bytes of GPU memory that it was made for
    gpu          for each layer a list of group numbers
    figures      what was predicted for it, for people: no program reads it

A plan is for a model, not for a weight type: a group is the same neurons in all of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from warmfront.coordinator.placement.solver import Mask
from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.files import write_whole
from warmfront.shared.model.store import PackedModel

__all__ = ["read_plan", "write_plan"]

FORMAT = "warmfront-plan-1"


def write_plan(path: Path, model: PackedModel, vram_budget: int, gpu: Mask, figures: Mapping[str, Any]) -> None:
    """Write the plan that gives the groups of `gpu`, bool [layers, groups], to the GPU.

    A file at `path` is replaced completely or not at all. Raises ResourceError if it cannot be written.
    """
    plan = {
        "format": FORMAT,
        "model": model.spec.name,
        "order": model.order,
        "vram_budget": vram_budget,
        "gpu": [np.flatnonzero(layer).tolist() for layer in gpu],
        "figures": dict(figures),
    }
    try:
        write_whole(path, (json.dumps(plan) + "\n").encode())
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; pass another -o FILE") from error


def read_plan(path: Path, model: PackedModel) -> Mask:
    """The groups that the plan at `path` gives to the GPU: bool [layers, groups].

    Raises UsageError if it cannot be read, or is not for `model` as it is now.
    """
    try:
        plan = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror}") from None
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
        raise UsageError(f"{path} is not a plan: it is not JSON; make one with `warmfront plan`") from None
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise UsageError(f"{path} is not a plan of the format {FORMAT}: make one with `warmfront plan`")
    if plan.get("model") != model.spec.name:
        raise UsageError(f"the plan {path} is for the model {plan.get('model')!r}, not for {model.spec.name!r}")
    if plan.get("order") != model.order:
        raise UsageError(f"the plan {path} was made for another order of the neurons: run `warmfront plan` again")
    return _mask(plan.get("gpu"), path, model)


def _mask(lists: object, path: Path, model: PackedModel) -> Mask:
    """The lists of a plan as a mask, checked."""
    gpu = np.zeros((model.spec.layers, model.layout.groups), np.bool_)
    again = "run `warmfront plan` again"
    if not isinstance(lists, list) or len(lists) != len(gpu):
        raise UsageError(f"the plan {path} does not list the groups of {len(gpu)} layers: {again}")
    for layer, numbers in enumerate(lists):
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise UsageError(f"the plan {path} has no list of group numbers for layer {layer}: {again}")
        if wrong := [number for number in numbers if not 0 <= number < gpu.shape[1]]:
            raise UsageError(
                f"the plan {path} gives group {wrong[0]} of layer {layer} to the GPU, of {gpu.shape[1]} groups: {again}"
            )
        if len(set(numbers)) != len(numbers):
            raise UsageError(f"the plan {path} gives a group of layer {layer} to the GPU twice: {again}")
        gpu[layer, numbers] = True
    return gpu
