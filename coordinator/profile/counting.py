"""Counts which neurons fire on text: before a model's first run on the built-in sample, or on texts of the user's.

A text is computed in jobs of up to 288 tokens, each as a text of its own: so a count can stop after any job and go on
from there, with the same numbers.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from os import W_OK, access
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.profile.counts import Profile, profiled
from warmfront.coordinator.profile.kept import kept_profile
from warmfront.coordinator.profile.reorder import reorder, restore
from warmfront.shared.errors import ResourceError
from warmfront.shared.files import locked
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel

__all__ = ["JOB_TOKENS", "Job", "count", "empty_profile", "ensure_profiled", "jobs_of"]

JOB_TOKENS = 288
Fires = Callable[[Sequence[int]], npt.NDArray[np.bool_]]


class Job(NamedTuple):
    """Tokens that are computed together; `fresh`: they begin a text."""

    ids: Sequence[int]
    fresh: bool


def jobs_of(texts: Sequence[Sequence[int]], most: int) -> list[Job]:
    """The texts, as token ids, in pieces of at most `most` tokens."""
    pieces = ([Job(ids[at : at + most], at == 0) for at in range(0, len(ids), most)] for ids in texts)
    return list(chain.from_iterable(pieces))


def empty_profile(model: PackedModel, texts: Sequence[str]) -> Profile:
    """A profile of `model` without a token yet; `texts`: names of what is going to be counted."""
    return Profile(model.spec.layers, model.layout.groups * GROUP, model.spec.ffn, model.spec.activation, texts)


def count(
    fires: Fires, profile: Profile, jobs: Sequence[Job], after: Callable[[int], None] = lambda _done: None
) -> None:
    """Add what fires in `jobs` to `profile`; `after` each job it gets the number of jobs done.

    `fires`: of token ids, bool [layers, tokens, neurons]. A KeyboardInterrupt comes between two jobs, `after` included.
    """
    for done, (ids, fresh) in enumerate(jobs, 1):
        fired = fires(ids)
        with hold_interrupts():
            profile.add(fired, fresh=fresh)
            after(done)


def ensure_profiled(
    model: PackedModel,
    on_sample: Callable[[], Profile],
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> bool:
    """Order `model` by its profile `on_sample` if it is sparse and never was; returns whether its file was replaced.

    A profile that the user made of this model before, and that outlived its packed file, is taken again.
    Where the cache has no room for a second copy of the model, it stays as it is. Of two that load it for the first
    time the second waits.
    """
    folder = model.path.parent
    if not model.spec.profiled or profiled(model) or not access(folder, W_OK):
        return False
    if shutil.disk_usage(folder).free < model.path.stat().st_size:
        return False
    with locked(model.path.with_suffix(".profile"), say):
        with PackedModel(model.path) as now:
            now.activate(model.spec.activation)
            if profiled(now):
                return True
        try:
            if (kept := kept_profile(model)) is not None:
                say(f"ordering the neurons by your profile ({', '.join(kept.profile.texts)})")
                restore(model.path, kept, say, partial(progress, "ordering"))
                return True
            say("profiling which neurons fire (first load only)")
            reorder(model.path, on_sample(), model.order, say, partial(progress, "ordering"))
        except ResourceError as error:
            say(f"the neurons stay in the order they came in: {error}")
            return False
    return True
