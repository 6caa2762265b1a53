"""Which of what an `Architecture` can say is not computed yet; the only place that knows."""

from collections.abc import Callable

from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture
from warmfront.shared.model.spec import ModelSpec

__all__ = ["check_supported"]

# Words (plural if they end in s) and how to tell. A feature that all passes and workers compute leaves this table.
_UNSUPPORTED: tuple[tuple[str, Callable[[Architecture], bool]], ...] = (
    ("attention sinks", lambda a: a.attention.sinks),
    ("parallel residual with post-norm", lambda a: a.residual == "parallel" and a.norm.placement != "pre"),
    ("biases within experts", lambda a: a.feed_forward.experts is not None and bool(a.feed_forward.biases)),
)


def check_supported(spec: ModelSpec) -> None:
    """Raise ModelError, in one line that names them all, if the model uses features that are not computed yet."""
    used = [words for words, uses in _UNSUPPORTED if uses(spec.architecture)]
    if used:
        words = f"{', '.join(used[:-1])} and {used[-1]}" if len(used) > 1 else used[0]
        verb = "are" if words.endswith("s") or len(used) > 1 else "is"
        raise ModelError(f"{spec.name} uses {words}, which {verb} not supported yet")
