"""`warmfront cluster`: which kinds of text there are, by the neurons that they use."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.selectors.clusters import cluster, save_clusters
from warmfront.shared.errors import ResourceError, UsageError

__all__ = ["cluster_texts", "render", "texts_in"]

# Pieces of texts that are compared: so many at most, spread over all texts, and of each so many tokens at least.
_MOST_PIECES, _LEAST_TOKENS = 256, 32


def texts_in(places: Sequence[Path]) -> list[Path]:
    """The files among `places`, and those in folders that end in .txt or .md. Raises UsageError for one without any."""
    files = []
    for place in places:
        inside = [place]
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix in (".txt", ".md"))
        if not inside:
            raise UsageError(f"{place} has no file that ends in .txt or .md: give texts")
        files += inside
    return files


def cluster_texts(
    model: str,
    texts: Sequence[str],
    overrides: dict[str, Any],
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Score the pieces of the texts, cluster them and keep that beside the packed model; what `--json` prints."""
    with Engine.load(model, selector="core", say=say, progress=progress, **overrides) as engine:
        session, core = engine.session, engine.session.core
        assert core is not None
        size = min(core.window, engine.plan.context)
        ids = [engine.tokenizer.encode(text) for text in texts]
        pieces = [some[at : at + size] for some in ids for at in range(0, len(some), size)]
        pieces = [piece for piece in pieces if len(piece) >= _LEAST_TOKENS]
        if len(pieces) < 2:
            raise UsageError(f"the texts have less than two pieces of {_LEAST_TOKENS} tokens: give more")
        chosen = np.linspace(0, len(pieces) - 1, min(len(pieces), _MOST_PIECES)).astype(int)
        scores = []
        for number, at in enumerate(chosen.tolist()):
            scores.append((session.core_scores(pieces[at]) / len(pieces[at])).astype(np.float32))
            progress("reading", number + 1, len(chosen))
        clusters = cluster(np.array(scores), engine.model.layout.ffn)
        try:
            path = save_clusters(engine.model, engine.plan.config.core_score, clusters)
        except OSError as error:
            raise ResourceError(f"cannot keep the clusters beside {engine.model.path}: {error.strerror}") from error
    return {"model": model, "pieces": len(chosen), "clusters": clusters.sizes.tolist(), "file": str(path)}


def render(facts: dict[str, Any]) -> str:
    """The object of `cluster_texts` as a line for people."""
    sizes = ", ".join(map(str, facts["clusters"]))
    return f"{facts['pieces']} pieces of text in {len(facts['clusters'])} clusters of {sizes}: {facts['file']}"
