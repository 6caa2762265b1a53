"""A family is a row.  pytest tests/coordinator/models/test_families.py"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import GGUF_FIELDS
from tests.coordinator.models.hf.folders import edited
from tests.shared.model.specs import SPEC, changed, uncomputed
from warmfront.coordinator.models.families import FAMILIES
from warmfront.coordinator.models.family import GGUF, HF
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.packing.packer import PackingPlan
from warmfront.shared.errors import ModelError
from warmfront.shared.model.tensors import file_shapes

Make = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_tensor_has_its_names(family: Any) -> None:
    for side in (HF, GGUF):
        top = [part for part, names in family.tensors.items() if "{i}" not in names[side]]
        assert [part for part in top if part != "positions"] == ["embed", "head", "norm"]
        # Those that share a name are neighbours: the order is that of their rows.
        names = [names[side] for names in family.tensors.values()]
        assert len([name for name, _ in itertools.groupby(names)]) == len(set(names))


def test_names_of_a_llama() -> None:
    family = FAMILIES["llama"]
    assert family.tensors.keys() == {name.rpartition(".")[2] for name, _ in file_shapes(SPEC)}
    assert family.hf_name("layers.12.q") == "model.layers.12.self_attn.q_proj.weight"
    assert family.hf_name("layers.3.attn_norm.bias") == "model.layers.3.input_layernorm.bias"
    assert family.hf_name("head") == "lm_head.weight"


def test_another_row_is_read_in_both_formats(
    tiny_llama: Make, tiny_gguf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "lama", FAMILIES["llama"])
    plain = tiny_llama(), tiny_gguf("plain.gguf")
    fields = {key.replace("llama.", "lama."): value for key, value in GGUF_FIELDS.items()}
    other = (
        edited(plain[0], tmp_path / "copy", model_type="lama"),
        tiny_gguf("other.gguf", architecture="lama", fields=fields, without=list(GGUF_FIELDS)),
    )
    for ours, theirs in zip(map(open_source, other), map(open_source, plain), strict=True):
        assert replace(ours.spec, name="") == replace(theirs.spec, name="", family="lama")
        assert ours.names() == theirs.names()
        for name in ours.names():
            np.testing.assert_array_equal(ours.tensor(name).float32(), theirs.tensor(name).float32())
    with pytest.raises(
        ModelError, match=r"model type 'mama' is not supported; llama, .*, lama are \(did you mean lama\?\)$"
    ):
        open_source(edited(plain[0], tmp_path / "mama", model_type="mama"))


def test_what_a_row_describes_may_not_be_computed_yet(
    tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened, and refused when it is to be packed."""
    llama = FAMILIES["llama"]
    norms = {f"{block}_post_norm": llama.tensors[f"{block}_norm"] for block in ("attn", "ffn")}
    tensors = {**llama.tensors, **norms}
    row = replace(llama, hf=lambda config, name: uncomputed(llama.hf(config, name)), tensors=tensors)
    monkeypatch.setitem(FAMILIES, "lama", row)
    source = open_source(edited(tiny_llama(), tmp_path / "copy", model_type="lama"))
    with pytest.raises(ModelError, match=r"^copy uses parallel residual with post-norm, which is not supported yet$"):
        PackingPlan(source, "auto")


def test_minicpm_is_a_granite_in_other_words(tiny_family: Make, tmp_path: Path) -> None:
    folder = tiny_family("granite", embedding_multiplier=12.0, residual_multiplier=0.7 / 3**0.5, logits_scaling=4.0)
    words = {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 0.7, "dim_model_base": 16}
    other = open_source(edited(folder, tmp_path / "copy", attention_multiplier=None, **words)).spec
    theirs = open_source(edited(folder, tmp_path / "plain", attention_multiplier=1.0)).spec
    assert other == replace(changed(theirs, "architecture.attention.scale", None), family="minicpm", name=other.name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma3",
            {"layer_types": ["full_attention"]},
            "layer_types is .*, not sliding_attention or",
        ),
        (
            "gemma3",
            {"layer_types": ["chunked_attention"] * 7},
            "layer_types is .*, not sliding_attention or",
        ),
        ("gemma3", {"layer_types": None, "num_hidden_layers": 2**31 - 1}, "are more than any model has"),
        ("gemma3", {"text_config": {"hidden_size": 64}}, "vision part, which is not supported; its language model is"),
        ("gemma2", {"use_bidirectional_attention": True}, "attends to what comes later too"),
        (
            "gemma2",
            {"model_type": "llama"},
            "_feedforward_layernorm.weight does not belong to the",
        ),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is not supported; one without is"),
        ("phi3", {"num_key_value_heads": 4}, r"qkv_proj.weight has shape \(128, 64\), config.json says"),
        ("phi3", {"intermediate_size": 64}, r"gate_up_proj.weight has shape \(192, 64\), config.json says"),
        ("phi3 longrope", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "short_factor is miss"),
        ("qwen2", {"model_type": "phi"}, "it has a bias of the head; llama"),
        ("falcon", {"alibi": True}, "a Falcon with alibi is not supported; one with RoPE is"),
        ("falcon", {"num_hidden_layers": 4}, r"transformer.h.3.input_layernorm.weight is missing"),
        (
            "falcon new",
            {"num_kv_heads": 4},
            r"query_key_value.weight has shape \(128, 64\), config.json says \(192, 64",
        ),
        ("gpt2", {"add_cross_attention": True}, "a GPT-2 with add_cross_attention is not supported; one without is"),
        ("gpt2", {"n_inner": 128}, r"mlp.c_fc.weight has shape \(64, 96\), config.json says \(64, 128\)"),
        ("opt", {"max_position_embeddings": 64}, r"embed_positions.weight has shape \(514, 64\), .* says \(66, 64\)"),
        ("opt", {"ffn_dim": None, "intermediate_size": None}, "field intermediate_size is missing"),
        ("opt behind", {"do_layer_norm_before": True}, "decoder.final_layer_norm.weight is missing"),
    ],
)
def test_folders_that_are_refused(
    tiny_family: Make, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_source(edited(tiny_family(name), tmp_path / "copy", **changes))
    assert "\n" not in str(caught.value)
