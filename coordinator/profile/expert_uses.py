"""Which experts a mixture chooses on text: counted, and kept as the user's own work, as profiles of neurons are.

The file in `profiles/` has `uses`, int64 [layers, experts], and `facts`, JSON: the tokens and the names of the texts.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.arrays import load_arrays, save_arrays
from warmfront.coordinator.profile.kept import profile_file
from warmfront.shared.errors import ResourceError
from warmfront.shared.model.branches import has_experts
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.store import PackedModel

__all__ = ["ExpertUses", "count_experts", "keep_expert_uses", "kept_expert_uses"]

Floats = npt.NDArray[np.float64]


class ExpertUses(NamedTuple):
    """How often each expert was chosen."""

    uses: npt.NDArray[np.int64]  # [layers, experts]; zeros in layers without experts
    tokens: int
    texts: list[str]

    def chances(self, active: int) -> Floats:
        """How often a token is expected to use each expert, [layers, experts], `active` in all of each layer.

        As if one token more had used all equally: an expert that was not chosen may be yet.
        """
        return np.asarray((self.uses + active / self.uses.shape[1]) / (self.tokens + 1))

    def shares(self) -> Floats:
        """Each expert's share of the choices of its layer, [layers, experts]."""
        return np.asarray(self.uses / np.maximum(self.uses.sum(1, keepdims=True), 1))

    def busiest(self) -> Floats:
        """The share of the choices that the busiest tenth of the experts gets in each layer that has any."""
        number = max(1, self.uses.shape[1] // 10)
        shares = np.sort(self.shares(), axis=1)[:, -number:].sum(1)
        return np.asarray(shares[self.uses.any(1)])


def count_experts(
    read: Callable[[Sequence[int]], object],
    uses: Callable[[], npt.NDArray[np.int64]],
    texts: Sequence[tuple[str, Sequence[int]]],
    most: int,
    after: Callable[[int], None],
) -> ExpertUses:
    """Count the choices on texts (names and token ids), each read in pieces of at most `most` tokens.

    `uses`: those since the start, [layers, experts]; `after` each piece it gets the number of tokens read.
    """
    tokens, before = 0, uses().copy()
    for _, ids in texts:
        for at in range(0, len(ids), most):
            piece = ids[at : at + most]
            read(piece)
            tokens += len(piece)
            after(tokens)
    return ExpertUses(uses() - before, tokens, [name for name, ids in texts if ids])


def keep_expert_uses(model: PackedModel, counted: ExpertUses) -> str:
    """Keep them for models of this content and weight type; the file. Raises ResourceError if it is not writable."""
    file = profile_file(model.path)
    try:
        save_arrays(file, uses=counted.uses, facts=json.dumps({"tokens": counted.tokens, "texts": counted.texts}))
    except OSError as error:
        raise ResourceError(f"cannot keep what was counted in {file}: {error.strerror}") from error
    return str(file)


def kept_expert_uses(model: PackedModel) -> ExpertUses | None:
    """Those kept for the content and weight type of `model`; None if there are none, or they are damaged."""
    kept = load_arrays(profile_file(model.path))
    with contextlib.suppress(ValueError, KeyError, TypeError):  # no file, or not one of ours
        facts = json.loads(str(kept["facts"]))
        counted = ExpertUses(kept["uses"].astype(np.int64, casting="safe"), int(facts["tokens"]), list(facts["texts"]))
        if _fits(model.spec, counted):
            return counted
    return None


def _fits(spec: ModelSpec, counted: ExpertUses) -> bool:
    """Whether they can be of that model: in each layer with experts as many choices as its tokens make."""
    experts = spec.architecture.feed_forward.experts
    if experts is None or counted.uses.shape != (spec.layers, experts.number) or counted.uses.min() < 0:
        return False
    wanted = [counted.tokens * experts.active * has_experts(spec, layer) for layer in range(spec.layers)]
    return bool((counted.uses.sum(1) == wanted).all())
