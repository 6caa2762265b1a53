"""How the files of a family of models are read: their settings, and their names of the tensors."""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.gguf.config import Factors, Found
from warmfront.coordinator.models.source import Order, head_order
from warmfront.shared.model.architecture import Positions
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.tensors import layer_shapes

__all__ = ["GGUF", "HF", "Cuts", "Family", "pair_order", "part_of", "published_name"]

# Index of each format's name in `Family.tensors`.
HF, GGUF = 0, 1
# Of parts of a layer that share a published tensor: the first row of each, and how many rows the tensor has.
Cuts = Mapping[str, tuple[int, int]]
# Our names of a model's tensors without numbers, and those of both formats.
Names = Mapping[str, tuple[str, str]]
# Our names of tensors (`tensors.py`).
_NAME = re.compile(r"(?:layers\.(?P<layer>\d+)\.)?(?:(?P<experts>experts\.)(?P<expert>\d+)\.)?(?P<part>.+)")
# Parts whose rows are those of heads that RoPE turns.
_TURNED = ("q", "k", "q_norm", "k_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the models of one family are read.

    Positions are read last: a rotary table is as long as the settings say, so the tensors must confirm the sizes first.
    """

    # The description but for positions, from config.json and the model's name.
    hf: Callable[[Fields, str], ModelSpec]
    hf_positions: Callable[[Fields, ModelSpec], Positions]
    # The same from a GGUF file's fields and what else is in it.
    gguf: Callable[[Fields, Found], ModelSpec]
    gguf_positions: Callable[[Fields, ModelSpec, Factors], Positions]
    # By our name (`tensors.py`) without numbers: Hugging Face's name and GGUF's, without ".weight" or ".bias". Parts of
    # one name lie in one matrix, one behind the other in the order that they have here; GGUF's experts in one stack.
    tensors: Names
    # The names in models that have a tensor by the name that this part has there.
    variant: tuple[str, Names] | None = None
    # Whether GGUF files have the two rows of a rotated pair side by side, not half a head apart (as Hugging Face's).
    gguf_pairs: bool = False
    # Whether Hugging Face's norms multiply by 1 + weight.
    norms_plus_one: bool = False
    # Whether Hugging Face's one matrix of q, k and v has, for each head of keys, its queries, the key, the value.
    hf_grouped: bool = False
    # Whether Hugging Face's matrices of layers are [in, out].
    hf_turned: bool = False
    # Whether Hugging Face's experts lie in stacks whose gates and ups take turns (`hf/expert_stacks.py`).
    hf_in_turns: bool = False
    # Hugging Face's names of matrices between embedding and residual, and between that and the head.
    hf_projections: tuple[str, str] | None = None

    def named(self, stored: Container[str], side: int) -> "Family":
        """The same with the names that the tensors `stored` have; `side`: HF or GGUF."""
        if self.variant is None:
            return self
        part, tensors = self.variant
        return replace(self, tensors=tensors) if f"{tensors[part][side].format(i=0)}.weight" in stored else self

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of the tensor that `tensors.py` calls `name`."""
        return published_name(name, lambda part: self.tensors[part][HF])

    def cuts(self, spec: ModelSpec, side: int) -> Cuts:
        """What lies where in tensors that hold several parts; `side`: HF or GGUF."""
        shapes, sizes = layer_shapes(spec), dict[tuple[str, bool], int]()
        first: dict[str, tuple[int, tuple[str, bool]]] = {}
        for part, shape in shapes.items():
            published = self.tensors[part.removesuffix(".bias")][side], part.endswith(".bias")
            first[part] = sizes.get(published, 0), published
            sizes[published] = first[part][0] + shape[0]
        return {
            part: (start, sizes[published])
            for part, (start, published) in first.items()
            if sizes[published] != shapes[part][0]
        }


def published_name(name: str, name_of: Callable[[str], str]) -> str:
    """What a file calls the tensor that `tensors.py` calls `name`, by its names of those without numbers."""
    match = _NAME.fullmatch(name.removesuffix(".bias"))
    assert match is not None
    published = name_of((match["experts"] or "") + match["part"]).format(i=match["layer"], e=match["expert"])
    return published + (".bias" if name.endswith(".bias") else ".weight")


def part_of(name: str) -> str:
    """The part of a layer that `tensors.py` calls `name`, without the layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def pair_order(spec: ModelSpec, name: str) -> Order | None:
    """How the rows of a tensor are to be ordered, so that rotated pairs lie side by side; None: as they are."""
    if part_of(name).removesuffix(".bias") not in _TURNED:
        return None
    positions = spec.architecture.positions
    table = positions.table_of(int(name.split(".")[1]))
    return head_order(spec.architecture.attention.head_dim, positions.rotary[table].dim) if table >= 0 else None
