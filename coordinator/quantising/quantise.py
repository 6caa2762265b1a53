"""`--dtype q4f`: which types a model's matrices get, and how it is packed in them.

Most are of 4.5 bits a weight (Q4S); as far as 4.8 bits in all allow, those whose rounding costs most get wider types.

A model in floats is packed as it is first, in a scratch file, and read a sample text with: rounding is weighed by what
the matrices then get (`feedback.py`). What has 4 bits already is not rounded again; of a mixture, whose experts would
need far more text each, and of a model without a tokenizer only the scales are searched (`scales.py`).
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from warmfront.coordinator.models.source import Source, padded
from warmfront.coordinator.packing.packer import FITTED, ensure_packed, kind_for, pack_source, predictor_kind
from warmfront.coordinator.profile.sample_text import SAMPLE_TEXT
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.files import make_folder
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.formats import BLOCK, FLOATS, Kind, row_bytes
from warmfront.shared.model.store import PackedModel
from warmfront.shared.paths import cache_root

__all__ = ["ensure_quantised"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
# Of the text, the length of a piece, which begins with no context; tokens in all; characters that surely make a token.
_PIECE, _TOKENS, _CHARACTERS = 256, 4096, 8
# A weight's bits in all, and which matrices get wider types while they last: those whose rounding alone costs SmolLM2
# most for each bit (docs/log.md); all of them together, or as many as there is room for.
_BITS = 4.8
_WIDER = (
    (("embed", "head"), Kind.Q4, True),
    (("down",), Kind.Q4, True),  # all layers have one layout
    (("v",), Kind.Q8, False),
)


def ensure_quantised(path: Path, dtype: str, say: Say, progress: Progress) -> Path:
    """`ensure_packed`, but with `dtype` q4f the weights are fitted to what the model reads.

    `progress` gets what is done, how much of it, and of how much.
    """
    refined = partial(_refined, say=say, progress=progress) if dtype == FITTED else None
    return ensure_packed(path, dtype, say, partial(progress, "packing"), refined)


@contextmanager
def _refined(source: Source, say: Say, progress: Progress) -> Iterator[Source]:
    with hold_interrupts():
        from warmfront.coordinator.quantising.source import QuantisedSource

    kinds = _kinds(source)
    before = {name: source.tensor(name).kind for name in kinds}
    if source.tokenizer is None or not {*before.values()} <= {*FLOATS} or not _can_sample(source):
        yield QuantisedSource(source, kinds, None)
        return
    with hold_interrupts():
        from warmfront.coordinator.quantising.inputs import sample
        from warmfront.coordinator.quantising.samples import Samples

    make_folder(cache_root() / "models")
    with tempfile.TemporaryDirectory(prefix=".quantising-", dir=cache_root() / "models") as scratch:
        samples = Samples(Path(scratch))
        try:
            say("reading a sample text, to round to 4 bits what it needs least (first use only)")
            whole = Path(scratch) / "whole.safetensors"
            with whole.open("wb") as file:
                pack_source(file.fileno(), source, "auto", partial(progress, "reading"))
            with PackedModel(whole) as model:
                texts = _texts(model)
                whole.unlink()
                sample(model, texts, samples, partial(progress, "sampling"))
            yield QuantisedSource(source, kinds, samples)
        finally:
            samples.close()


def _can_sample(source: Source) -> bool:
    """Whether the feed-forward is one that `sample` computes: a mixture's is not."""
    return source.spec.architecture.feed_forward.experts is None


def _texts(model: PackedModel) -> Sequence[Sequence[int]]:
    """Pieces of the built-in text and, evenly spaced, of the language reference that comes with Python.

    The text alone has fewer tokens than a matrix has columns, and what it does not show is rounded blindly.
    """
    from pydoc_data.topics import topics  # 0.7 MB of text, which no other start needs

    tokenizer, piece = Tokenizer(model), min(_PIECE, model.spec.context)
    ids = tokenizer.encode(SAMPLE_TEXT)
    texts = [ids[at : at + piece] for at in range(0, len(ids), piece)]
    reference = "\n".join(topics[name] for name in sorted(topics))
    count = max(_TOKENS - len(ids), 0) // piece
    for i in range(count):
        at = len(reference) * i // count
        texts.append(tokenizer.encode(reference[at : at + _CHARACTERS * piece])[:piece])
    return texts


def _kinds(source: Source) -> dict[str, Kind]:
    """The types of the matrices that are not what they are to be."""
    kinds: dict[str, Kind] = {}
    sizes: dict[str, int] = {}
    for name in source.names():
        tensor, part = source.tensor(name), name.rpartition(".")[2]
        if len(tensor.shape) != 2 or part in ("router", "shared_router", "positions"):
            continue
        sizes[name] = tensor.shape[0] * padded(tensor.shape[1])
        kinds[name] = predictor_kind(tensor, FITTED) if part in ("fc1", "fc2") else kind_for(tensor, FITTED)
    total = sum(sizes.values())

    def bits(kinds: Mapping[str, Kind]) -> float:
        return 8 / BLOCK * sum(sizes[name] * row_bytes(kind, BLOCK) for name, kind in kinds.items()) / total

    for parts, kind, together in _WIDER:
        own = {name: source.tensor(name).kind for name in kinds if name.rpartition(".")[2] in parts}
        wider = {name: max(kind, own[name]) for name in sorted(own) if own[name] < kinds[name] == Kind.Q4S}
        for some in [wider] if together else [{name: wider[name]} for name in wider]:
            if bits(kinds | some) <= _BITS:
                kinds |= some
    return {name: kind for name, kind in kinds.items() if kind != source.tensor(name).kind}
