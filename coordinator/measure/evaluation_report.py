"""What an evaluation has found, as an object for `--json`, as a table and as a picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.measure.forced_decode import Measured
from warmfront.coordinator.measure.picture import write_picture

__all__ = ["DENSE", "Row", "as_object", "draw", "render"]

# The label of the reference.
DENSE = "dense"
# Of a loss: exp of more is no float64.
_MOST = 700.0

_HEADS = (
    *("selector", "perplexity", "above dense", "(±)", "agrees", "KL, nats", "kept", "fired", "recall", "by mass"),
    "tok/s",
)

Doubles = npt.NDArray[np.float64]


class Row(NamedTuple):
    """A run over all pieces."""

    label: str
    # Nats a token; how much more than the dense model's, and the standard error of that difference.
    loss: float
    above: float
    error: float
    # Shares of the tokens behind which the most probable token is the dense model's; KL(dense || this), nats a token.
    agreement: float
    divergence: float
    # Shares of all neurons that were selected, [layers].
    kept: Doubles
    # See `Measured`.
    looked_at: int
    found: Doubles
    decode_tps: float

    @classmethod
    def of(cls, label: str, pieces: Sequence[Measured], dense: Sequence[Measured], neurons: Sequence[int]) -> "Row":
        """`dense`: of the reference, piece by piece; `neurons`: of each layer."""
        losses, expected = (np.concatenate([piece.losses for piece in each]) for each in (pieces, dense))
        more = losses - expected
        return cls(
            label=label,
            loss=float(losses.mean()),
            above=float(more.mean()),
            error=float(more.std() / math.sqrt(len(more))),
            agreement=float(np.concatenate([piece.agreements for piece in pieces]).mean()),
            divergence=float(np.concatenate([piece.divergences for piece in pieces]).mean()),
            kept=np.sum([piece.kept for piece in pieces], axis=0) / (len(losses) * np.array(neurons, np.float64)),
            looked_at=sum(piece.looked_at for piece in pieces),
            found=np.sum([piece.found for piece in pieces], axis=0),
            decode_tps=len(losses) / max(sum(piece.seconds for piece in pieces), 1e-9),
        )

    def share_kept(self, neurons: Sequence[int]) -> float:
        """Of the neurons of all layers."""
        return float(self.kept @ neurons / sum(neurons))

    def share_fired(self, neurons: Sequence[int]) -> float:
        """Of the neurons of all layers."""
        return float(self.found[:, 0].sum() / max(1, self.looked_at * sum(neurons)))

    @property
    def recall(self) -> tuple[float, float] | None:
        """Of the neurons that fire, and of what they weigh, the shares that were selected, all layers together; None
        if nothing was looked at."""
        fired, hit, mass, kept = self.found.sum(0)
        return (hit / max(fired, 1), kept / mass) if mass else None

    def by_layer(self, sparse: bool) -> list[dict[str, float | None]]:
        """Of each layer."""
        return [
            {
                "kept": round(float(kept), 5),
                "recall": round(float(hit / max(fired, 1)), 5) if sparse and mass else None,
                "recall_by_mass": round(float(selected / mass), 5) if mass else None,
            }
            for kept, (fired, hit, mass, selected) in zip(self.kept, self.found, strict=True)
        ]


def _perplexity(loss: float) -> float | None:
    return math.exp(min(loss, _MOST)) if math.isfinite(loss) else None


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) + 0.0 if math.isfinite(value) else None  # no -0.0 either


def as_object(facts: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The object that is printed; `facts`: of the model and the texts. The first row is the reference's."""
    sparse, neurons = facts["sparse"], facts["neurons"]
    return {
        **facts,
        "perplexity": {row.label: _perplexity(row.loss) for row in rows},
        "rows": [
            {
                "selector": row.label,
                "perplexity": _perplexity(row.loss),
                "loss": _finite(row.loss),
                "loss_above_dense": _finite(row.above),
                "standard_error": _finite(row.error),
                "agreement": round(row.agreement, 6),
                "divergence": _finite(row.divergence),
                "kept": round(row.share_kept(neurons), 5),
                # Where no neuron is exactly zero, all fire.
                "fired": round(row.share_fired(neurons), 5) if row.recall and sparse else None,
                "recall": round(row.recall[0], 5) if row.recall and sparse else None,
                "recall_by_mass": round(row.recall[1], 5) if row.recall else None,
                "decode_tps": round(row.decode_tps, 2),
                "layers": row.by_layer(sparse),
            }
            for row in rows
        ],
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cells(row: Mapping[str, Any], dense: float | None) -> list[str]:
    perplexity = row["perplexity"]
    return [
        row["selector"],
        _number(perplexity, ".3f"),
        "" if perplexity is None or dense is None else f"{perplexity / dense - 1:+.2%}",
        # To the first order a difference of losses is that of perplexities, as a ratio.
        _number(row["standard_error"], ".2%"),
        _number(row["agreement"], ".1%"),
        _number(row["divergence"], ".5f"),
        _number(row["kept"], ".1%"),
        _number(row["fired"], ".1%"),
        _number(row["recall"], ".1%"),
        _number(row["recall_by_mass"], ".2%"),
        _number(row["decode_tps"], ".1f"),
    ]


def render(result: Mapping[str, Any]) -> Iterator[str]:
    """The table for people, and of selectors that leave neurons out where the layers are furthest apart."""
    yield (
        f"{result['name']} · {result['dtype']} · {result['tokens']:,} tokens decoded by force in {result['pieces']} "
        f"pieces, of each the first {result['forced_from']} tokens prefilled · {', '.join(result['texts'])}"
    )
    dense = result["rows"][0]["perplexity"]
    lines = [list(_HEADS), *(_cells(row, dense) for row in result["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join((first.ljust(widths[0]), *cells)).rstrip()
    for row in result["rows"][1:]:
        kept = [layer["kept"] for layer in row["layers"]]
        if min(kept) == 1:
            continue
        least, most = kept.index(min(kept)), kept.index(max(kept))
        line = f"{row['selector']}: kept by layer {kept[least]:.1%} ({least}) to {kept[most]:.1%} ({most})"
        masses = [layer["recall_by_mass"] for layer in row["layers"]]
        if None not in masses:
            worst = masses.index(min(masses))
            line += f", recall by mass at least {masses[worst]:.2%} ({worst})"
        yield line


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a picture (`picture.py`): the divergence from the dense model over tok/s, and the shares of neurons by
    layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, layers = figure.subplots(1, 2)
    for number, row in enumerate(result["rows"]):
        colour = f"C{number}"
        if row["divergence"] is not None:
            at = row["decode_tps"], row["divergence"]
            losses.plot(*at, "o", color=colour)
            losses.annotate(row["selector"], at, (5, 4), textcoords="offset points", fontsize="small")
        if row["selector"] == DENSE:
            continue
        layers.plot([layer["kept"] for layer in row["layers"]], color=colour, label=f"{row['selector']}, kept")
        masses = [layer["recall_by_mass"] for layer in row["layers"]]
        if None not in masses:
            layers.plot(masses, ":", color=colour, label="recall by mass")
    losses.set(xlabel="tok/s", ylabel="KL to the dense model, nats a token", title=f"{result['name']}")
    losses.margins(0.12)
    losses.set_xlim(left=0)
    layers.set(xlabel="layer", title=f"shares of the neurons, {result['tokens']:,} tokens", ylim=(0, 1.05))
    if layers.lines:
        layers.legend(fontsize="x-small", ncols=2)
    write_picture(figure, path)
