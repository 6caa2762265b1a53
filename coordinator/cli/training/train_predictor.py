"""`warmfront train-predictor`: records what the feed-forward layers get on the user's texts, and predicts by it.

What is recorded, and each layer that is done, is kept in a folder beside the packed model until the file is written: a
run that was interrupted or killed is gone on with by the same command.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from warmfront.coordinator.cli.profile import encoded, read_texts
from warmfront.coordinator.engine.load import open_for_profiling, opened, settled
from warmfront.coordinator.measure.picture import write_picture
from warmfront.coordinator.models.find import find_model
from warmfront.coordinator.models.hf.predictors import write_predictor_file
from warmfront.coordinator.packing.arrays import Arrays
from warmfront.coordinator.packing.packer import mended
from warmfront.coordinator.packing.predictor_file import GATE_SIGNS, gate_signs
from warmfront.coordinator.profile.counting import Job, jobs_of
from warmfront.coordinator.quantising.quantise import ensure_quantised
from warmfront.coordinator.training.inputs import Inputs, token_bytes
from warmfront.coordinator.training.layer import LEAST_TOKENS, LayerReport, Wish, fit_layer
from warmfront.coordinator.training.neurons import neurons_of
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.files import locked
from warmfront.shared.model.store import PackedModel

__all__ = ["Request", "draw", "render", "train"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
# What is going on, seconds passed, seconds left.
Remaining = Callable[[str, float, float], None]
# Tokens of a text that are recorded together, and that an interruption costs at most.
_PIECE = 512
_PARTS = ("fc1.weight", "fc2.weight", "fc2.bias")


class Request(NamedTuple):
    """What a user asked for; `tokens`: at most, `disk`: bytes for inputs."""

    model: str
    texts: Sequence[Path]
    wish: Wish
    tokens: int | None
    disk: int
    out: Path | None


def train(
    request: Request, config: EngineConfig, say: Say, progress: Progress, recorded: Progress, remaining: Remaining
) -> dict[str, Any]:
    """Make the file and return the object that `--json` prints.

    `progress` gets bytes, `recorded` tokens. Raises UsageError for texts or a model without use, ResourceError.
    """
    texts = read_texts(request.texts)
    return mended(lambda: _train(request, texts, config, say, progress, recorded, remaining), say)


def _train(
    request: Request,
    texts: Sequence[str],
    config: EngineConfig,
    say: Say,
    progress: Progress,
    recorded: Progress,
    remaining: Remaining,
) -> dict[str, Any]:
    found = find_model(request.model, say, progress)
    path = ensure_quantised(found, config.dtype, say, progress)
    config = settled(path, config, say, progress)
    with opened(path, config) as packed, locked(path.with_suffix(".training"), say):
        jobs = _jobs(packed, texts, request, say)
        tokens, spec = sum(len(job.ids) for job in jobs), packed.spec
        key = _digest([spec.activation, [[job.fresh, *job.ids] for job in jobs]])
        inputs = Inputs(path.with_name(f"{path.stem}-training"), (spec.layers, tokens, spec.hidden), key)
        _record(path, config, jobs, inputs, say, progress, recorded)
        made = [*_layers(packed, inputs, request.wish, remaining)]
        out = request.out or Path(re.sub(r"[^\w.-]+", "-", spec.name) + ".predictor.safetensors")
        _write(out, packed, made, say)
        inputs.remove()
        reports = [LayerReport(**json.loads(str(layer["report"]))) for layer in made]
    return _facts(request, str(out), tokens, reports)


def _jobs(packed: PackedModel, texts: Sequence[str], request: Request, say: Say) -> list[Job]:
    """The texts in pieces, as many tokens as the disk is to hold; raises UsageError for a model that never predicts."""
    spec = packed.spec
    if not spec.profiled:
        raise UsageError(f"{spec.name} {spec.why_unprofiled}: there is no telling which of its neurons fire")
    each = token_bytes(spec.layers, spec.hidden)
    most = request.disk // each
    need = f"predictors are made from {LEAST_TOKENS} or more"
    if most < LEAST_TOKENS:
        raise UsageError(f"a --disk of {request.disk} holds the inputs of {most} tokens: {need}")
    ids = encoded(packed, texts, min(request.tokens or most, most), say)
    tokens = sum(map(len, ids))
    if tokens < LEAST_TOKENS:
        raise UsageError(f"the texts have {tokens} tokens: {need}")
    say(f"the inputs of {tokens:,} tokens take {tokens * each / 1e9:.2f} GB of disk until the file is written")
    return jobs_of(ids, min(_PIECE, spec.context))


def _record(
    path: Path,
    config: EngineConfig,
    jobs: Sequence[Job],
    inputs: Inputs,
    say: Say,
    progress: Progress,
    recorded: Progress,
) -> None:
    total = inputs.shape[1]
    if inputs.done:
        say(f"going on after {inputs.done:,} of {total:,} tokens, which an earlier run has recorded")
    if inputs.done == total:
        return
    how = replace(config, selector="exact", gpu="none", policy="static", context=max(len(job.ids) for job in jobs))
    at = 0
    with open_for_profiling(path, how, say, progress) as session:
        for job in jobs:
            if at >= inputs.done:
                session.reset()
                inputs.add(session.feed_forward_inputs(job.ids))
                recorded("recording", inputs.done, total)
            at += len(job.ids)


def _layers(packed: PackedModel, inputs: Inputs, wish: Wish, remaining: Remaining) -> Iterator[Arrays]:
    """Each layer's predictor and report."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key, layers, names = _digest([packed.order, *wish]), packed.spec.layers, (*_PARTS, "report")
    started, first = time.monotonic(), None
    for layer in range(layers):
        made = inputs.made(layer, key, names)
        if made is None:
            first = layer if first is None else first
            begun: int = first

            def show(part: float, layer: int = layer, begun: int = begun) -> None:
                passed = time.monotonic() - started
                done = layer - begun + part
                remaining(f"layer {layer + 1} of {layers}", passed, passed / max(done, 0.01) * (layers - begun - done))

            made = _fitted(packed, layer, inputs, wish, device, show)
            inputs.keep(layer, key, made)
        yield made


def _fitted(
    packed: PackedModel, layer: int, inputs: Inputs, wish: Wish, device: str, progress: Callable[[float], None]
) -> Arrays:
    progress(0)
    try:
        with torch.no_grad():
            predictor, report = fit_layer(neurons_of(packed, layer, device), inputs.of(layer), wish, device, progress)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{device} has not enough memory for layer {layer}: pass a smaller --tokens") from error
    # In the file the neurons are in the order of the published model.
    places = packed.places()[layer][: packed.spec.ffn]
    return {
        "fc1.weight": predictor.fc1.half().cpu().numpy(),
        "fc2.weight": predictor.fc2.half().cpu().numpy()[np.argsort(places)],
        "fc2.bias": predictor.bias.cpu().numpy()[np.argsort(places)],
        "report": np.array(json.dumps(report._asdict())),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _write(out: Path, packed: PackedModel, made: Sequence[Arrays], say: Say) -> None:
    metadata = {"input": "normed", "activation": "none", GATE_SIGNS: gate_signs(packed)}
    try:
        write_predictor_file(out, [{part: layer[part] for part in _PARTS} for layer in made], metadata)
    except OSError as error:
        raise ResourceError(
            f"cannot write {out}: {error.strerror}; what was trained is kept: the same command with another -o goes on"
        ) from error
    say(f"the predictor is in {out}: pass --predictor {out}")


def _facts(request: Request, file: str, tokens: int, reports: Sequence[LayerReport]) -> dict[str, Any]:
    wish, columns = request.wish, np.array(reports, np.float64).mean(0).tolist()
    return {
        "model": request.model,
        "file": file,
        "tokens": tokens,
        "wished_recall_by_mass": wish.recall,
        "max_density": wish.max_density,
        "mean": dict(zip(LayerReport._fields, columns, strict=True)),
        # Rounding and other tokens than the threshold was chosen by: half a point is no miss.
        "short_of_recall": [i for i, report in enumerate(reports) if report.recall_by_mass < wish.recall - 0.005],
        "without_gain": [i for i, report in enumerate(reports) if report.reads >= 1],
        "layers": [report._asdict() for report in reports],
    }


def render(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as lines for people: all shares are of tokens that were held out."""
    yield f"{facts['model']}: predictors from {facts['tokens']:,} tokens; of a tenth of them, held out:"
    yield "layer  rank  fire   selected  of the mass  of the firing  reads"
    for number, layer in enumerate(facts["layers"]):
        yield _row(f"{number:5}", layer)
    yield _row(" mean", facts["mean"])
    yield "reads: predictor and gates of the selected neurons, against all gates, which the selector exact reads"
    if short := facts["short_of_recall"]:
        why = "" if facts["max_density"] is None else f" with at most {facts['max_density']:.1%} selected"
        yield f"short of the wished {facts['wished_recall_by_mass']:.1%} of the mass{why}: layers {_listed(short)}"
    if idle := facts["without_gain"]:
        yield f"as much is read as by the selector exact, which misses nothing: layers {_listed(idle)}"


def _row(label: str, layer: dict[str, Any]) -> str:
    shares = (f"{layer[name]:{width}.1%}" for name, width in _COLUMNS)
    return f"{label}  {round(layer['rank']):4} {''.join(shares)}"


_COLUMNS = (("fired", 6), ("density", 10), ("recall_by_mass", 13), ("recall_by_count", 15), ("reads", 7))


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def draw(facts: dict[str, Any], path: Path) -> None:
    """Write a picture (`picture.py`): recall by layer, and what is selected, what fires and what is read."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = facts["layers"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for panel, names in ((left, ("recall_by_mass", "recall_by_count")), (right, ("fired", "density", "reads"))):
        for name in names:
            panel.plot([100 * layer[name] for layer in layers], ".-", label=name.replace("_", " "))
    left.axhline(100 * facts["wished_recall_by_mass"], color="grey", linewidth=0.8, label="wished, by mass")
    left.set(xlabel="layer", ylabel="%")
    right.set(xlabel="layer", ylabel="% of the neurons, or of the gates", ylim=(0, None))
    for panel in (left, right):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend()
    figure.suptitle(f"{facts['model']}: ranks {', '.join(str(layer['rank']) for layer in layers)}", wrap=True)
    write_picture(figure, path)
