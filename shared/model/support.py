"""Which of what an `Architecture` can say is not computed yet; the only place that knows."""

from collections.abc import Callable

from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture
from warmfront.shared.model.spec import ModelSpec

__all__ = ["check_supported"]

# Words (plural if they end in s) and how to tell. A feature that all passes and workers compute leaves this table.
_UNSUPPORTED: tuple[tuple[str, Callable[[Architecture], bool]], ...] = (
    ("layer norm", lambda a: a.norm.kind == "layer"),
    ("post-norm", lambda a: a.norm.placement == "post"),
    ("sandwich norm", lambda a: a.norm.placement == "sandwich"),
    ("norm biases", lambda a: a.norm.bias),
    ("learned positions", lambda a: a.positions.learned_offset is not None),
    ("no position encoding", lambda a: not a.positions.rotary and a.positions.learned_offset is None),
    ("rotary embedding in some layers only", lambda a: -1 in a.positions.rotary_of_layer),
    ("rotary embedding that differs by layer", lambda a: len({*a.positions.rotary_of_layer} - {-1}) > 1),
    ("partial rotary embedding", lambda a: any(t.dim != a.attention.head_dim for t in a.positions.rotary)),
    ("q/k norm", lambda a: a.attention.qk_norm),
    ("attention soft cap", lambda a: a.attention.soft_cap is not None),
    ("attention sinks", lambda a: a.attention.sinks),
    ("parallel residual", lambda a: a.residual == "parallel"),
    ("ungated feed-forward", lambda a: not a.feed_forward.gated),
    ("activation of up (dReLU)", lambda a: a.feed_forward.up_activation is not None),
    ("activation threshold (FATReLU)", lambda a: a.feed_forward.threshold is not None),
    ("feed-forward biases", lambda a: bool(a.feed_forward.biases)),
    ("mixture of experts (MoE)", lambda a: a.feed_forward.experts is not None),
    ("embedding scale", lambda a: a.embedding_scale != 1),
    ("logit soft cap", lambda a: a.logit_cap is not None),
)


def check_supported(spec: ModelSpec) -> None:
    """Raise ModelError, in one line that names them all, if the model uses features that are not computed yet."""
    used = [words for words, uses in _UNSUPPORTED if uses(spec.architecture)]
    if used:
        words = f"{', '.join(used[:-1])} and {used[-1]}" if len(used) > 1 else used[0]
        verb = "are" if words.endswith("s") or len(used) > 1 else "is"
        raise ModelError(f"{spec.name} uses {words}, which {verb} not supported yet")
