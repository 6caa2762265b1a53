"""Puts the neurons of a packed model into the order that a profile suggests, and the profile beside them.

The file is written anew and takes the place of the old one at once; who has the old one open goes on with it. With down
rows of type Q4C, whose scales lie in the group's tail for 32 neurons together, groups move as they are.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.ordering import order_groups, order_neurons
from warmfront.coordinator.packer import Shapes, locked, packed_header, published, tensor_bytes, write_tensors
from warmfront.coordinator.profile import Profile
from warmfront.shared.bundle import GROUP
from warmfront.shared.errors import ResourceError
from warmfront.shared.store import PackedModel
from warmfront.shared.weights import Kind

__all__ = ["reorder"]

Bytes = npt.NDArray[np.uint8]
Permutation = npt.NDArray[np.int64]


def reorder(
    path: Path, profile: Profile, order: str, say: Callable[[str], None], progress: Callable[[int, int], None]
) -> bool:
    """Order the packed model at `path` by `profile`, which was counted when its order was `order`, and keep that in it.

    Returns whether the order changed: then what was made from the old one (`lowbit.py`) is gone. Raises ResourceError
    when there is no room, or when another process was faster.
    """
    folder = path.parent
    try:
        with locked(folder, say), PackedModel(path) as model:
            if model.order != order:
                raise ResourceError(f"another warmfront has reordered {model.spec.name} meanwhile: start again")
            permutation = _permutation(model, profile)
            changed = bool((permutation != np.arange(permutation.shape[1])).any())
            if changed:
                order = hashlib.sha256(order.encode() + permutation.tobytes()).hexdigest()[:12]
            with published(path) as fd:
                _write(fd, model, permutation, profile.reordered(permutation), order, progress)
            if changed:
                for file in folder.iterdir():
                    if file.name.startswith(f"{path.stem}-lowbit"):
                        file.unlink()
    except OSError as error:
        raise ResourceError(
            f"cannot write the reordered model to {folder}: {error.strerror}; make room for a second copy of it"
        ) from error
    return changed


def _permutation(model: PackedModel, profile: Profile) -> Permutation:
    """int64 [layers, neurons]."""
    arrange = order_groups if model.layout.down_kind == Kind.Q4C else order_neurons
    return np.stack([arrange(counts, model.spec.ffn) for counts in profile.counts])


def _write(
    fd: int,
    model: PackedModel,
    permutation: Permutation,
    profile: Profile,
    order: str,
    progress: Callable[[int, int], None],
) -> None:
    counts = profile.counts
    shapes: Shapes = {name: (entry.element, entry.shape) for name, entry in model.entries.items() if name != "profile"}
    shapes["profile"] = ("U16", counts.shape)
    kinds = {name: int(entry.kind) for name, entry in model.entries.items() if entry.kind is not None}
    kinds |= {"gate": int(model.layout.gate_kind), "down": int(model.layout.down_kind)}
    header = packed_header(model.spec, kinds, model.text, shapes, order=order, profile=profile.to_json())

    def tensors() -> Iterator[npt.NDArray[Any]]:
        for name in shapes:
            yield counts if name == "profile" else _reordered(model, name, permutation)

    write_tensors(fd, header, tensors(), sum(tensor_bytes(*shape) for shape in shapes.values()), progress)


def _reordered(model: PackedModel, name: str, permutation: Permutation) -> Bytes:
    """The bytes of tensor `name`, those of neurons in their new places."""
    data = model.bytes_of(name)
    _, _, role = name.rpartition(".")
    if role not in ("ffn", "fc2"):
        return data
    order = permutation[int(name.split(".")[1])]
    if role == "ffn" and model.layout.down_kind == Kind.Q4C:
        return np.asarray(data.reshape(model.layout.groups, -1)[order[::GROUP] // GROUP])
    return np.asarray(data.reshape(len(order), -1)[order])
