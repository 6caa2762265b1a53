"""`warmfront profile`: counts which neurons fire on the user's texts, and orders the model's neurons accordingly; of a
mixture of experts it counts which experts are chosen.

The counts of neurons are saved beside the packed model every few seconds and when the run is interrupted; the next run
on the same texts continues from there.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.load import open_for_profiling, opened, settled
from warmfront.coordinator.engine.stats import Statistics
from warmfront.coordinator.models.find import find_model
from warmfront.coordinator.models.published_order import read_order
from warmfront.coordinator.packing.arrays import load_arrays, save_arrays
from warmfront.coordinator.packing.packer import mended
from warmfront.coordinator.profile.counting import JOB_TOKENS, Job, count, empty_profile, jobs_of
from warmfront.coordinator.profile.counts import MAX_TOKENS, Profile
from warmfront.coordinator.profile.expert_uses import ExpertUses, count_experts, keep_expert_uses
from warmfront.coordinator.profile.kept import keep_profile
from warmfront.coordinator.profile.reorder import reorder
from warmfront.coordinator.quantising.quantise import ensure_quantised
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.store import PackedModel

__all__ = ["Partial", "encoded", "profile", "read_texts", "render"]

_SAVE_EVERY_S = 5.0
_LISTED = 6  # experts of a layer that are named
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def profile(
    model: str,
    files: Sequence[Path],
    config: EngineConfig,
    tokens: int | None,
    order: Path | None,
    say: Say,
    progress: Progress,
    counted: Progress,
) -> dict[str, Any]:
    """Count on `files`, at most `tokens` in all, order the neurons and return the object that `--json` prints.

    `order`: a published order, in place of that by the counts. `progress` gets bytes, `counted` tokens. Raises
    UsageError for texts that cannot be read or a model without them, ModelError for an order of another model.
    """
    texts = [*zip((file.name for file in files), read_texts(files), strict=True)]
    return mended(lambda: _profile(model, texts, config, tokens, order, say, progress, counted), say)


def _profile(
    model: str,
    texts: Sequence[tuple[str, str]],
    config: EngineConfig,
    tokens: int | None,
    order: Path | None,
    say: Say,
    progress: Progress,
    counted: Progress,
) -> dict[str, Any]:
    found = find_model(model, say, progress)
    path = ensure_quantised(found, config.dtype, say, progress)
    config = settled(path, config, say, progress)
    with opened(path, config) as packed:
        ids = encoded(packed, [text for _, text in texts], tokens, say)
        if packed.spec.architecture.feed_forward.experts is not None:
            if order is not None:
                raise UsageError(f"--order, but {packed.spec.name} is a mixture of experts: its neurons stay in order")
            named = [(name, some) for (name, _), some in zip(texts, ids, strict=True)]
            return _expert_facts(model, packed, _count_experts(path, config, named, say, progress, counted))
        jobs = jobs_of(ids, min(JOB_TOKENS, packed.spec.context))
        partial = Partial.open(packed, jobs, [name for (name, _), some in zip(texts, ids, strict=True) if some])
        before = packed.order
        published = None if order is None else read_order(order, packed.spec.layers, packed.spec.ffn)
    try:
        _count(path, config, jobs, partial, say, progress, counted)
        changed = reorder(
            path, partial.profile, before, say, lambda done, total: progress("ordering", done, total), published
        )
    except BaseException:
        partial.keep(say)
        raise
    with opened(path, config) as packed:
        keep_profile(packed, say)
    partial.path.unlink(missing_ok=True)
    return _facts(model, path, partial.profile, changed)


def read_texts(files: Sequence[Path]) -> list[str]:
    """The texts in `files`; raises UsageError for one that cannot be read, is not UTF-8 or is empty."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the text {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 (byte {error.start}): give text in that encoding") from error
        if not texts[-1].strip():
            raise UsageError(f"{file} is empty: give a file with some text")
    return texts


def encoded(model: PackedModel, texts: Sequence[str], limit: int | None, say: Say) -> list[list[int]]:
    """Token ids of the texts, `limit` of them at most."""
    spec, tokenizer = model.spec, Tokenizer(model)
    if not spec.profiled and spec.architecture.feed_forward.experts is None:
        raise UsageError(
            f"{spec.name} {spec.why_unprofiled}; its neurons are not chosen one by one, there is nothing to profile"
        )
    ids = [tokenizer.encode(text) for text in texts]
    if not any(ids):
        raise UsageError("the texts have no token that the model knows: give others")
    left = min(limit or MAX_TOKENS, MAX_TOKENS)
    if left != limit and (have := sum(map(len, ids))) > left:
        say(f"the texts have {have:,} tokens: the first {left:,} are counted")
    cut = []
    for some in ids:
        cut.append(some[:left])
        left -= len(cut[-1])
    return cut


@dataclass(slots=True)
class Partial:
    """A count that may be interrupted."""

    path: Path
    key: str  # a digest of the jobs, of the order of the neurons and of the activation
    profile: Profile  # so far
    done: int = 0  # jobs that it has counted

    @classmethod
    def open(cls, model: PackedModel, jobs: Sequence[Job], names: Sequence[str]) -> "Partial":
        """The count of an earlier run, if it was of the same jobs with the same order of neurons; else an empty one."""
        key = json.dumps([model.order, model.spec.activation, [[job.fresh, *job.ids] for job in jobs]])
        digest = hashlib.sha256(key.encode()).hexdigest()
        partial = cls(model.path.with_name(f"{model.path.stem}-counted.npz"), digest, empty_profile(model, names))
        kept = load_arrays(partial.path)
        with contextlib.suppress(ValueError, KeyError, TypeError):  # there is no file, or it is not one of ours
            facts = json.loads(str(kept["facts"]))
            if facts["key"] == digest:
                partial.profile = Profile.restored(kept["counts"], model.spec.ffn, facts)
                partial.profile.texts = list(names)
                partial.done = facts["done"]
        return partial

    def save(self) -> None:
        """Write the count to its file; raises ResourceError if there is no space."""
        facts = self.profile.facts | {"key": self.key, "done": self.done}
        try:
            with hold_interrupts():
                save_arrays(self.path, counts=self.profile.counts, facts=json.dumps(facts))
        except OSError as error:
            raise ResourceError(f"cannot keep what was counted in {self.path}: {error.strerror}") from error

    def keep(self, say: Say) -> None:
        """Save what was counted when a run ends early; a note says if that fails."""
        if self.done:
            try:
                self.save()
            except ResourceError as error:
                say(str(error))


def _count(
    path: Path,
    config: EngineConfig,
    jobs: Sequence[Job],
    partial: Partial,
    say: Say,
    progress: Progress,
    counted: Progress,
) -> None:
    total, first = sum(len(job.ids) for job in jobs), partial.done
    if first:
        say(f"going on after {sum(partial.profile.tokens):,} of {total:,} tokens, which an earlier run has counted")
    if first == len(jobs):
        return
    saved_at = time.monotonic()

    def after(done: int) -> None:
        nonlocal saved_at
        partial.done = first + done
        counted("profiling", sum(partial.profile.tokens), total)
        if time.monotonic() - saved_at > _SAVE_EVERY_S:
            partial.save()
            saved_at = time.monotonic()

    # A job of one token is run as two (`Session.firing`).
    context = max(2, *(len(job.ids) for job in jobs))
    how = replace(config, selector="exact", gpu="none", policy="static", context=context)
    with open_for_profiling(path, how, say, progress) as session:
        count(session.firing, partial.profile, jobs[first:], after)


def _count_experts(
    path: Path,
    config: EngineConfig,
    texts: Sequence[tuple[str, list[int]]],
    say: Say,
    progress: Progress,
    counted: Progress,
) -> ExpertUses:
    total, longest = sum(len(ids) for _, ids in texts), max(len(ids) for _, ids in texts)
    how = replace(config, gpu="none", policy="static", context=min(JOB_TOKENS, longest))
    with open_for_profiling(path, how, say, progress, profiles=False) as session:
        statistics = Statistics(session)

        def read(ids: Sequence[int]) -> None:
            with session.text() as text:
                session.forget(text, 0)
                session.read(text, list(ids), want_logits=False)

        def uses() -> npt.NDArray[np.int64]:
            known = statistics.expert_uses()
            assert known is not None
            return known

        most = min(JOB_TOKENS, session.plan.context)
        return count_experts(read, uses, texts, most, lambda done: counted("profiling", done, total))


def _expert_facts(model: str, packed: PackedModel, counted: ExpertUses) -> dict[str, Any]:
    experts, busiest = packed.spec.architecture.feed_forward.experts, counted.busiest()
    assert experts is not None
    return {
        "model": model,
        "tokens": counted.tokens,
        "texts": counted.texts,
        "experts": experts.number,
        "active": experts.active,
        "busiest_tenth": {"least": busiest.min(), "mean": busiest.mean(), "most": busiest.max()},
        "shares": counted.shares().tolist(),
        "path": keep_expert_uses(packed, counted),
    }


def _facts(model: str, path: Path, counted: Profile, changed: bool) -> dict[str, Any]:
    active, hot = counted.active(), counted.hot_share()
    return {
        "model": model,
        "tokens": sum(counted.tokens),
        "texts": counted.texts,
        "segments": len(counted.tokens),
        "firing": {"least": active.min(), "mean": active.mean(), "most": active.max()},
        "hot": {"least": hot.min(), "mean": hot.mean(), "most": hot.max()},
        "reordered": changed,
        "path": str(path),
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    if "experts" in facts:
        return "\n".join(_expert_lines(facts))
    firing, hot = (
        f"{shares['mean']:.1%} of the neurons (by layer {shares['least']:.1%} to {shares['most']:.1%})"
        for shares in (facts["firing"], facts["hot"])
    )
    how = "ordered anew" if facts["reordered"] else "in the same order"
    return "\n".join(
        (
            f"  counted    {facts['tokens']:,} tokens of {', '.join(facts['texts'])}",
            f"  a token    fires {firing}",
            f"  80 %       of the firing is made by {hot}",
            f"  written    {facts['path']}, neurons {how}",
        )
    )


def _expert_lines(facts: dict[str, Any]) -> Iterator[str]:
    """A line for each layer that has experts: what the busiest tenth got, and the shares of the busiest."""
    number, busiest = facts["experts"], facts["busiest_tenth"]
    tenth = max(1, number // 10)
    yield f"  counted    {facts['tokens']:,} tokens of {', '.join(facts['texts'])}"
    yield (
        f"  the {tenth} busiest of {number} experts get {busiest['mean']:.1%} of the choices "
        f"(by layer {busiest['least']:.1%} to {busiest['most']:.1%}; alike: {tenth / number:.1%})"
    )
    for layer, shares in enumerate(facts["shares"]):
        if any(shares):
            order = sorted(range(number), key=lambda expert: -shares[expert])
            most = ", ".join(f"{expert} {shares[expert]:.1%}" for expert in order[:_LISTED])
            yield f"  layer {layer:4} {sum(shares[expert] for expert in order[:tenth]):6.1%}: {most}"
    yield f"  written    {facts['path']}"
