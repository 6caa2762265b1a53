"""From a model's name to a session that runs: packed, profiled, decided, started, calibrated.

Each first time is paid once: packing (`packing/packer.py`), the profile (`profile/counting.py`), the thresholds of the
selector lowbit (`selectors/calibration.py`) and what layers lose by a core (`text_core.py`) are kept in the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.activation_trial import with_activation
from warmfront.coordinator.engine.offloading import with_budgets
from warmfront.coordinator.engine.resolve import Devices, resolve, resolve_devices, selectors_for
from warmfront.coordinator.engine.session import Session
from warmfront.coordinator.models.find import find_model
from warmfront.coordinator.packing.packer import mended
from warmfront.coordinator.packing.predictor_file import attach_predictor
from warmfront.coordinator.profile.counting import JOB_TOKENS, count, empty_profile, ensure_profiled, jobs_of
from warmfront.coordinator.profile.counts import Profile
from warmfront.coordinator.profile.sample_text import HELD_OUT_TEXT, SAMPLE_TEXT
from warmfront.coordinator.quantising.quantise import ensure_quantised
from warmfront.coordinator.selectors.divergence import divergence
from warmfront.coordinator.text.sampling import Sampler
from warmfront.shared.config import THREADING, EngineConfig, Sampling
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Source

if TYPE_CHECKING:
    from warmfront.coordinator.selectors.lowbit import Lowbit

__all__ = ["load", "open_for_profiling", "opened", "settled"]

Floats = npt.NDArray[np.float32]
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
# Tokens by which a selector is judged.
_JUDGED = 128
# Texts that a model writes itself, and their tokens.
_OWN_TEXTS, _OWN_TOKENS = 4, 48


def load(name: str, config: EngineConfig, say: Say, progress: Progress) -> Session:
    """A session on the model `name` (as `find_model` takes it), ready for a user's texts.

    Raises a WarmfrontError; then nothing is left running.
    """
    devices = resolve_devices(config, say)
    session = mended(lambda: _load(name, config, devices, say, progress), say)
    lowbit = session.runtime.lowbit
    # A core watches over itself (`text_core.py`).
    if lowbit is None or session.core is not None or config.max_loss is None or lowbit.loss <= config.max_loss:
        return session
    session.close()
    instead = next(able for able in selectors_for(session.model.spec) if not able.predicts)
    say(f"the selector {session.plan.selector} loses more than --max-loss {config.max_loss:g}: {instead} is used")
    # Nothing is predicted any more, ahead or not.
    return load(name, replace(config, selector=instead.name, look_ahead=False), say, progress)


def _load(name: str, config: EngineConfig, devices: Devices, say: Say, progress: Progress) -> Session:
    path = ensure_quantised(find_model(name, say, progress), config.dtype, say, progress)
    config = settled(path, config, say, progress)
    model = _predicted(opened(path, config), config, say)
    try:
        config = with_budgets(config, model)
        plan = resolve(config, devices, model, say)
        if ensure_profiled(model, partial(_profile_sample, model, config, say, progress), say, progress):
            model.close()
            model = _predicted(opened(path, config), config, say)
        session = Session(model, plan)
        if session.tokenizer.note:
            say(session.tokenizer.note)
    except BaseException:
        model.close()
        raise
    return _started(session, say, progress)


def _predicted(model: PackedModel, config: EngineConfig, say: Say) -> PackedModel:
    """`model` with the predictor of `config`, if that names one."""
    if config.predictor is not None:
        try:
            attach_predictor(model, Path(config.predictor), config.dtype, say)
        except BaseException:
            model.close()
            raise
    return model


def settled(path: Path, config: EngineConfig, say: Say, progress: Progress) -> EngineConfig:
    """`config` with the activation of the packed model at `path`, which is found out now if its files leave it open."""
    return with_activation(path, config, lambda how: open_for_profiling(path, how, say, progress), say)


def opened(path: Path, config: EngineConfig) -> PackedModel:
    """The packed model at `path` with the activation of `config`; raises UsageError if it cannot have that."""
    model = PackedModel(path)
    if config.activation != "auto":
        try:
            model.activate(config.activation)
        except BaseException:
            model.close()
            raise
    return model


def open_for_profiling(
    path: Path, config: EngineConfig, say: Say, progress: Progress, *, profiles: bool = True
) -> Session:
    """A session on the packed model at `path` as it is, that can say which neurons fire if it `profiles`."""
    devices = resolve_devices(config, say)
    model = opened(path, config)
    try:
        session = Session(model, resolve(with_budgets(config, model), devices, model, say), profiles=profiles)
    except BaseException:
        model.close()
        raise
    return _started(session, say, progress)


def _started(session: Session, say: Say, progress: Progress) -> Session:
    try:
        session.start(say, progress)
        _calibrate(session, say)
        if Source.CORE in session.plan.selector.sources:
            session.open_core(say)
            _measure_core(session, say)
        session.serve()
    except BaseException:
        session.close()
        raise
    return session


def _profile_sample(model: PackedModel, config: EngineConfig, say: Say, progress: Progress) -> Profile:
    profile = empty_profile(model, ["sample"])
    threads = {name: getattr(config, name) for name in THREADING}
    overrides = EngineConfig(
        dtype=config.dtype,
        activation=model.spec.activation,
        **threads,
        gpu="none",
        policy="static",
        ram_budget=config.ram_budget,
    )
    with open_for_profiling(model.path, overrides, say, progress) as session:
        count(session.firing, profile, jobs_of([sample_ids(session)], min(JOB_TOKENS, session.plan.context)))
    return profile


def _calibrate(session: Session, say: Say) -> None:
    """Find the thresholds of the selector lowbit, if it is used and they are not known."""
    lowbit = session.runtime.lowbit
    if lowbit is None or lowbit.calibrated:
        return
    with hold_interrupts():
        from warmfront.coordinator.selectors.calibration import calibrate

    say(f"calibrating the selector for a recall of {lowbit.recall:g} (first use only)")
    lowbit.select_all()  # until the thresholds are known
    judged = sample_ids(session, held_out=True)[: min(_JUDGED, session.plan.context)]
    calibrate(lowbit, session.model, session.feed_forward_inputs(sample_ids(session)))
    lowbit.loss = _loss(session, lowbit, judged)
    say(f"it loses {lowbit.loss:.2g} nats a token (KL divergence from all neurons, over {len(judged)} tokens)")
    lowbit.save(say)
    session.reset()


def _measure_core(session: Session, say: Say) -> None:
    """Find the layers that have no core, if they are not known."""
    if session.core is not None and session.core.whole is None and session.plan.context >= 16:
        say("measuring what each layer loses by its core (first use only)")
        session.measure_core(sample_ids(session))


def _loss(session: Session, lowbit: "Lowbit", ids: list[int]) -> float:
    """How far what the model says, decoding a text, is from what it says with all neurons: nats a token."""
    thresholds = lowbit.thresholds.copy()
    lowbit.select_all()
    dense = [*_logits(session, ids)]
    lowbit.thresholds[:] = thresholds
    return float(np.mean([divergence(*pair) for pair in zip(dense, _logits(session, ids), strict=True)]))


def _logits(session: Session, ids: list[int]) -> Iterator[Floats]:
    """After each token, as if they came one by one: float32 [vocab].

    In batches, whose rows are those of single tokens, and which the workers' statistics leave out.
    """
    with session.text() as text:
        session.forget(text, 0)
        at = 0
        while at < len(ids):
            logits = session.verify(text, ids[at : at + session.runtime.batch]).copy()
            for _ in logits[1:]:
                session.accept(text)
            at += len(logits)
            yield from logits


def sample_ids(session: Session, *, held_out: bool = False) -> list[int]:
    """Token ids such as the model may meet: a built-in text, or where it has no words for that, its own.

    `held_out`: of another text, on which nothing was calibrated.
    """
    if session.tokenizer.present:
        ids = session.tokenizer.encode(HELD_OUT_TEXT if held_out else SAMPLE_TEXT)
        if len(set(ids)) > len(ids) // 4:
            return ids
    starts = np.random.default_rng(int(held_out)).integers(session.model.spec.vocab, size=_OWN_TEXTS)
    return [token for start in starts for token in _own_text(session, int(start))]


def _own_text(session: Session, start: int) -> list[int]:
    """`start` and what the model itself goes on with."""
    sampler, ids = Sampler(Sampling(temperature=1.0, seed=0)), [start]
    with session.text() as text:
        logits, _ = session.prefill(text, ids)
        while True:
            ids.append(sampler.pick(logits, ids))
            if len(ids) > _OWN_TOKENS or len(ids) >= session.plan.context:
                return ids
            logits = session.step(text, ids[-1])
