"""Which of several plausible activations a model was trained with: measured once, when it is first loaded.

GGUF has no field for the activation, and a model run with the wrong one writes nonsense without an error. So the
model reads a built-in text with each of them, and the perplexities tell. The finding is kept beside the packed file.
"""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from warmfront.coordinator.engine.session import Session
from warmfront.coordinator.profile.sample_text import SAMPLE_TEXT
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.config import THREADING, EngineConfig
from warmfront.shared.files import locked, write_whole
from warmfront.shared.model.store import PackedModel

__all__ = ["with_activation"]

# Tokens of the text that are read at once, and those that are then read one by one, whose probabilities count: some 2
# seconds for each activation with 1 B weights.
_READ, _COUNTED = 64, 32
# Another activation than the files' is taken if its perplexity is so many times lower. A wrong one is off by a factor
# of ten and more; the chance of 32 tokens alone makes some 1.3. And who does no better than guessing tells nothing.
_CLEAR, _GUESSING = 2.0, 0.5
Say = Callable[[str], None]


def with_activation(
    path: Path, config: EngineConfig, open_session: Callable[[EngineConfig], Session], say: Say
) -> EngineConfig:
    """`config` with the activation of the packed model at `path` settled, if it is "auto" and the files leave it open.

    `open_session`: loads the model by a configuration. Raises a WarmfrontError if that fails.
    """
    with PackedModel(path) as model:
        plausible, vocab, tokenizer = model.plausible, model.spec.vocab, Tokenizer(model)
    if config.activation != "auto" or len(plausible) < 2:
        return config
    file = path.with_suffix(".activation.json")
    known = _known(file, plausible)
    if known is not None:
        return replace(config, activation=known)
    ids = tokenizer.encode(SAMPLE_TEXT)[: _READ + _COUNTED] if tokenizer.present else []
    if len(ids) < _READ + _COUNTED:
        chosen = plausible[0]
        say(f"activation {chosen}: the files leave it open, and there is no tokenizer to check it with")
    else:
        found = {name: _perplexity(open_session(_how(config, name)), ids) for name in plausible}
        chosen = _chosen(plausible, found, vocab)
        others = ", ".join(f"{found[name]:.3g} with {name}" for name in plausible if name != chosen)
        say(f"activation {chosen}: the model reads a text with a perplexity of {found[chosen]:.3g} ({others})")
    with contextlib.suppress(OSError), locked(file):
        write_whole(file, json.dumps({"activation": chosen}).encode())
    return replace(config, activation=chosen)


def _known(file: Path, plausible: Sequence[str]) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(file.read_bytes())["activation"]
        if known in plausible:
            return str(known)
    return None


def _how(config: EngineConfig, activation: str) -> EngineConfig:
    threads = {name: getattr(config, name) for name in THREADING}
    return EngineConfig(
        dtype=config.dtype,
        activation=activation,
        selector="all",
        **threads,
        gpu="none",
        policy="static",
        context=_READ + _COUNTED,
    )


def _perplexity(session: Session, ids: Sequence[int]) -> float:
    """Of the last tokens of `ids`; infinite if the model cannot compute them. Closes the session."""
    loss = 0.0
    with session, session.text() as text:
        logits, _ = session.prefill(text, list(ids[:_READ]))
        for token in ids[_READ:]:
            wide = logits.astype(np.float64)
            loss += float(np.logaddexp.reduce(wide) - wide[token])
            logits = session.step(text, token)
    mean = loss / (len(ids) - _READ)
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def _chosen(plausible: Sequence[str], found: dict[str, float], vocab: int) -> str:
    best = min(plausible, key=lambda name: found[name])
    clear = found[best] * _CLEAR < found[plausible[0]] and found[best] < _GUESSING * vocab
    return best if clear else plausible[0]
