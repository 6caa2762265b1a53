"""Which of what an `Architecture` can say is not computed yet; the only place that knows."""

from collections.abc import Callable

from warmfront.shared.errors import ModelError
from warmfront.shared.model.branches import bounds_of, dense_branches
from warmfront.shared.model.spec import ModelSpec

__all__ = ["check_supported"]


def _has_experts(spec: ModelSpec) -> bool:
    return spec.architecture.feed_forward.experts is not None


def _dense_is_too_wide(spec: ModelSpec) -> bool:
    return _has_experts(spec) and dense_branches(spec) == len(bounds_of(spec))


def _predicts_some(spec: ModelSpec) -> bool:
    experts = spec.architecture.feed_forward.experts
    return spec.predictor is not None and experts is not None and bool(experts.shared or experts.dense_layers)


# Words (plural if they end in s) and how to tell. A feature that all passes and workers compute leaves this table.
_UNSUPPORTED: tuple[tuple[str, Callable[[ModelSpec], bool]], ...] = (
    (
        "parallel residual with post-norm",
        lambda s: s.architecture.residual == "parallel" and s.architecture.norm.placement != "pre",
    ),
    ("layers without experts wider than all experts", _dense_is_too_wide),
    ("predictors beside shared experts or layers without experts", _predicts_some),
)


def check_supported(spec: ModelSpec) -> None:
    """Raise ModelError, in one line that names them all, if the model uses features that are not computed yet."""
    used = [words for words, uses in _UNSUPPORTED if uses(spec)]
    if used:
        words = f"{', '.join(used[:-1])} and {used[-1]}" if len(used) > 1 else used[0]
        verb = "are" if words.endswith("s") or len(used) > 1 else "is"
        raise ModelError(f"{spec.name} uses {words}, which {verb} not supported yet")
