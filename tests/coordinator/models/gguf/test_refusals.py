"""GGUF files that are no language model that runs: one line says what each is.

pytest tests/coordinator/models/gguf/test_refusals.py
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError


@pytest.mark.parametrize(
    ("architecture", "kind", "message"),
    [
        ("clip", "mmproj", "is the part of a model that sees or hears, not its language model"),
        ("clip", None, "is the part of a model that sees or hears"),
        ("llama", "adapter", r"is an adapter \(LoRA\) without the model that it changes; merge it"),
        ("llama", "imatrix", "is statistics for quantising, not a model"),
        ("llama", "vocab", "is a vocabulary without weights; give the whole model"),
        ("llama", "split", "is an order of a model's neurons, as SparkInfer writes it; give the model itself"),
        ("bert", "model", "'bert' is an encoder, which writes no text; .*llama.* are"),
        ("mamba", None, "architecture 'mamba' is not supported; .*llama.* are"),
    ],
)
def test_what_a_file_is_instead(
    tiny_gguf: Callable[..., Path], architecture: str, kind: str | None, message: str
) -> None:
    fields = {} if kind is None else {"ffn_group_size": 16} if kind == "split" else {"general.type": kind}
    path = tiny_gguf(architecture=architecture, fields=fields)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(path)
    assert str(caught.value).startswith(str(path))


def test_a_model_says_that_it_is_one(tiny_gguf: Callable[..., Path]) -> None:
    assert open_source(tiny_gguf(fields={"general.type": "model"})).spec.family == "llama"


def test_weights_that_cannot_be_read(tiny_gguf: Callable[..., Path]) -> None:
    path = tiny_gguf(values={"blk.0.ffn_up.weight": np.ones((512, 256), np.float64)})  # type: ignore[dict-item]
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight has type F64, which cannot be read; choose a file"):
        open_source(path)
