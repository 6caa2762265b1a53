"""Which of what an `Architecture` can say is not computed yet; the only place that knows."""

from collections.abc import Callable

from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture
from warmfront.shared.model.spec import ModelSpec

__all__ = ["check_supported"]

# In words, and how to tell. A feature that the passes and the workers have learned leaves this table.
_UNSUPPORTED: tuple[tuple[str, Callable[[Architecture], bool]], ...] = (
    ("layer norm", lambda a: a.norm.kind == "layer"),
    ("post-norm", lambda a: a.norm.placement == "post"),
    ("sandwich norm", lambda a: a.norm.placement == "sandwich"),
    ("norm biases", lambda a: a.norm.bias),
    ("learned positions", lambda a: a.positions.learned_offset is not None),
    ("attention without positions", lambda a: not a.positions.rotary and a.positions.learned_offset is None),
    ("rotary positions in some layers only", lambda a: -1 in a.positions.rotary_of_layer),
    ("rotary frequencies that differ between layers", lambda a: len({*a.positions.rotary_of_layer} - {-1}) > 1),
    (
        "rotary positions on a part of the head",
        lambda a: any(table.dim != a.attention.head_dim for table in a.positions.rotary),
    ),
    ("q/k norm", lambda a: a.attention.qk_norm),
    ("attention soft cap", lambda a: a.attention.soft_cap is not None),
    ("sliding window", lambda a: any(a.attention.windows)),
    ("attention sinks", lambda a: a.attention.sinks),
    ("parallel residual", lambda a: a.residual == "parallel"),
    ("ungated feed-forward", lambda a: not a.feed_forward.gated),
    ("activation of up", lambda a: a.feed_forward.up_activation is not None),
    ("activation threshold (FATReLU)", lambda a: a.feed_forward.threshold > 0),
    ("feed-forward biases", lambda a: bool(a.feed_forward.biases)),
    ("mixture of experts", lambda a: a.feed_forward.experts is not None),
    ("embedding scale", lambda a: a.embedding_scale != 1),
    ("logit soft cap", lambda a: a.logit_cap is not None),
)


def check_supported(spec: ModelSpec) -> None:
    """Raise ModelError, in one line that names them all, if the model uses features that are not computed yet."""
    used = [words for words, uses in _UNSUPPORTED if uses(spec.architecture)]
    if used:
        words = " and ".join(filter(None, (", ".join(used[:-1]), used[-1])))
        verb = "are" if len(used) > 1 or used[0].endswith(("biases", "positions", "sinks")) else "is"
        raise ModelError(f"{spec.name} uses {words}, which {verb} not supported yet")
