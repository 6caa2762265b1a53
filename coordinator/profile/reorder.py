"""Puts the neurons of a packed model into the order that a profile suggests, and stores the profile with them.

The file is written again and replaces the old one at once; a process that has the old one open goes on with it. With
down rows of type Q4C, whose scales belong to 32 neurons together, whole groups are moved.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.beside import remove_others
from warmfront.coordinator.packing.packed_file import Shapes, write_packed
from warmfront.coordinator.profile.counts import Profile
from warmfront.coordinator.profile.kept import KeptProfile
from warmfront.coordinator.profile.ordering import order_groups, order_neurons
from warmfront.shared.errors import ResourceError
from warmfront.shared.files import locked, published
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.store import PackedModel

__all__ = ["reorder", "restore"]

Bytes = npt.NDArray[np.uint8]
Permutation = npt.NDArray[np.int64]


def reorder(
    path: Path,
    profile: Profile,
    order: str,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
    published: Permutation | None = None,
) -> bool:
    """Order the packed model at `path` by `profile`, which was counted in its order `order`, and store that in it.

    `published`: int64 [layers, ffn], the original model's neuron that is to come to each place, in place of that order.

    Returns whether the order changed: then what was made for the old one (`packing/beside.py`) is removed.
    Raises ResourceError when there is no room, or when another process was faster.
    """
    with _rewriting(path, order, say) as (fd, model):
        permutation = _permutation(model, profile.counts if published is None else _as_counts(model, published))
        changed = bool((permutation != np.arange(permutation.shape[1])).any())
        if changed:
            order = hashlib.sha256(order.encode() + permutation.tobytes()).hexdigest()[:12]
        _write(fd, model, permutation, profile.reordered(permutation), order, progress)
    if changed:
        remove_others(path, order)
    return changed


def restore(path: Path, kept: KeptProfile, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Bring the packed model at `path` from its original order into that of a kept profile, and store that in it.

    Raises ResourceError as `reorder` does.
    """
    with _rewriting(path, "", say) as (fd, model):
        _write(fd, model, kept.places, kept.profile, kept.order, progress)


@contextlib.contextmanager
def _rewriting(path: Path, order: str, say: Callable[[str], None]) -> Iterator[tuple[int, PackedModel]]:
    """The file that is to replace the packed model at `path`, and that model, which has to be in the given `order`."""
    try:
        with locked(path, say), PackedModel(path) as model:
            if model.order != order:
                raise ResourceError(f"another warmfront has reordered {model.spec.name} meanwhile: start again")
            with published(path) as fd:
                yield fd, model
    except OSError as error:
        raise ResourceError(
            f"cannot write the reordered model to {path.parent}: {error.strerror}; make room for a second copy of it"
        ) from error


def _permutation(model: PackedModel, counts: npt.NDArray[Any]) -> Permutation:
    """int64 [layers, neurons]: the neuron that comes to each place, by counts of [layers, segments, neurons]."""
    arrange = order_groups if model.layout.down_kind == Kind.Q4C else order_neurons
    return np.stack([arrange(layer, model.spec.ffn) for layer in counts])


def _as_counts(model: PackedModel, published: Permutation) -> npt.NDArray[np.int64]:
    """Counts by which the neurons get that order, or their groups the nearest: the hotter, the earlier they come."""
    places, ffn = model.places(), model.spec.ffn
    hotness = np.zeros(places.shape, np.int64)
    np.put_along_axis(hotness, published, np.arange(ffn, 0, -1)[None], axis=1)
    return np.take_along_axis(hotness, places, axis=1)[:, None]


def _write(
    fd: int,
    model: PackedModel,
    permutation: Permutation,
    profile: Profile,
    order: str,
    progress: Callable[[int, int], None],
) -> None:
    made: dict[str, npt.NDArray[Any]] = {
        "profile": profile.counts,
        "places": np.take_along_axis(model.places(), permutation, axis=1).astype(np.uint32),
    }
    shapes: Shapes = {name: (entry.element, entry.shape) for name, entry in model.entries.items() if name not in made}
    names = list(shapes)
    shapes |= {"profile": ("U16", made["profile"].shape), "places": ("U32", made["places"].shape)}
    kinds = {name: int(entry.kind) for name, entry in model.entries.items() if entry.kind is not None}
    kinds |= {"gate": int(model.layout.gate_kind), "down": int(model.layout.down_kind)}
    tensors = chain((_reordered(model, name, permutation) for name in names), made.values())
    more: dict[str, Any] = {"order": order, "profile": profile.to_json(), "plausible": json.dumps(model.plausible)}
    write_packed(fd, model.spec, kinds, model.text, shapes, ([tensor] for tensor in tensors), progress, **more)


def _reordered(model: PackedModel, name: str, permutation: Permutation) -> Bytes:
    """The bytes of tensor `name`, with those of neurons in their new places."""
    data = model.bytes_of(name)
    role = name.split(".", 2)[-1]
    if role not in ("ffn", "fc2", "fc2.bias"):
        return data
    order = permutation[int(name.split(".")[1])]
    if role == "ffn" and model.layout.down_kind == Kind.Q4C:
        return np.asarray(data.reshape(model.layout.groups, -1)[order[::GROUP] // GROUP])
    return np.asarray(data.reshape(len(order), -1)[order])
