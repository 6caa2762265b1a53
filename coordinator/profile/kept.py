"""Profiles of the user's own texts, kept apart from the packed models that they were made for.

A packed model can be made again from the model, a profile cannot. So `warmfront profile` also keeps it in `profiles/`
in the cache, by the model's content (`content.py`) and weight type: counts, places of the neurons, name of the order
(`store.py`). When the model is packed again it gets the same order, so that plans made for that still fit.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.arrays import load_arrays, save_arrays
from warmfront.coordinator.profile.counts import Profile
from warmfront.shared.model.store import PackedModel
from warmfront.shared.paths import cache_root

__all__ = ["KeptProfile", "keep_profile", "kept_profile", "profile_file"]


class KeptProfile(NamedTuple):
    """A profile and the order of the neurons in which it was kept."""

    profile: Profile
    places: npt.NDArray[np.int64]  # [layers, neurons]: the original model's neuron that comes to each place
    order: str  # the name of that order


def profile_file(packed: Path) -> Path:
    """Where the profile of a packed model is kept: by weight type and content, with which the file's name ends."""
    return cache_root() / "profiles" / f"{'-'.join(packed.stem.rsplit('-', 2)[1:])}.npz"


def keep_profile(model: PackedModel, say: Callable[[str], None]) -> None:
    """Keep the profile that `model` has; `say` gets a line if the cache cannot be written."""
    counted, file = Profile.of(model), profile_file(model.path)
    assert counted is not None
    facts = counted.facts | {"order": model.order, "model": model.spec.name}
    try:
        save_arrays(file, counts=counted.counts, places=model.places(), facts=json.dumps(facts))
    except OSError as error:
        say(f"the profile is in the packed model alone, {file} cannot be written: {error.strerror}")


def kept_profile(model: PackedModel) -> KeptProfile | None:
    """The profile kept for content, weight type and activation of `model`; None if there is none, or it is damaged."""
    neurons = np.arange(model.places().shape[1])
    kept = load_arrays(profile_file(model.path))
    with contextlib.suppress(ValueError, KeyError, TypeError):  # no file, or not one of ours
        facts, counts, places = json.loads(str(kept["facts"])), kept["counts"], kept["places"].astype(np.int64)
        profile = Profile.restored(counts, model.spec.ffn, facts)
        sound = counts.shape == (model.spec.layers, len(profile.tokens), len(neurons)) and counts.dtype == np.uint16
        sound &= profile.activation == model.spec.activation
        if sound and places.shape == model.places().shape and (np.sort(places, axis=1) == neurons).all():
            return KeptProfile(profile, places, str(facts["order"]))
    return None
