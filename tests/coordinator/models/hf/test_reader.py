"""The weights of a folder against transformers.  pytest tests/coordinator/models/hf/test_reader.py"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.coordinator.models.hf.folders import LINEAR, LLAMA3, changed, edited, frequencies_of, state
from warmfront.coordinator.models import source as source_module
from warmfront.coordinator.models.families import FAMILIES
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack

Floats = npt.NDArray[np.float32]
Make = Callable[..., Path]
# The names of a layer's tensors, as in `model.layers.0.NAME.weight`.
PARTS = {
    part: hf.removeprefix("model.layers.{i}.") for part, (hf, _) in FAMILIES["llama"].tensors.items() if "{i}" in hf
}


@pytest.mark.parametrize(("dtype", "kind"), [("float32", Kind.F32), ("float16", Kind.F16), ("bfloat16", Kind.BF16)])
def test_tensors_are_those_of_the_model(tiny_llama: Make, dtype: str, kind: Kind) -> None:
    folder = tiny_llama(dtype=dtype, attention_bias=True, mlp_bias=True)
    reference = state(folder)
    source = open_source(folder)
    assert len(source.names()) == 3 + 2 * (2 + 7 + 7)
    np.testing.assert_array_equal(source.tensor("embed").float32(), reference["model.embed_tokens.weight"])
    np.testing.assert_array_equal(source.tensor("head").float32(), reference["lm_head.weight"])
    np.testing.assert_array_equal(source.tensor("norm").float32(), reference["model.norm.weight"])
    for layer in range(2):
        for part, published in PARTS.items():
            ours = source.tensor(f"layers.{layer}.{part}")
            theirs = reference[f"model.layers.{layer}.{published}.weight"].numpy()
            assert ours.kind == kind
            if part == "down":
                theirs = theirs.T
            assert ours.shape == theirs.shape
            if part not in ("q", "k"):
                np.testing.assert_array_equal(ours.float32(), theirs)
            if ours.float32().ndim == 2:
                np.testing.assert_array_equal(unpack(ours.packed(kind), kind, ours.shape[1]), ours.float32())
        for part in ("v", "o", "gate", "up", "down"):
            theirs = reference[f"model.layers.{layer}.{PARTS[part]}.bias"].numpy()
            np.testing.assert_array_equal(source.tensor(f"layers.{layer}.{part}.bias").float32(), theirs)


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3])
def test_attention_scores_of_rotated_pairs(tiny_llama: Make, rope: dict[str, Any] | None) -> None:
    """q.k at several distances, rotated as interleaved pairs here and as halves by transformers."""
    folder = tiny_llama(attention_bias=True, rope_parameters=rope)
    reference = state(folder)
    source = open_source(folder)
    x = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    positions = np.array([0, 1, 5, 40, 41, 200, 511])

    def project(part: str) -> Floats:
        weight, bias = source.tensor(f"layers.1.{part}"), source.tensor(f"layers.1.{part}.bias")
        pairs = (x @ weight.float32().T + bias.float32()).reshape(7, -1, 8, 2)
        angle = positions[:, None] * np.array(frequencies_of(source))
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
        return np.stack((turned.real, turned.imag), axis=-1).reshape(7, -1, 16).astype(np.float32)

    ours = np.einsum("phd,qhd->hpq", project("q"), np.repeat(project("k"), 2, axis=1))

    def theirs_of(part: str) -> torch.Tensor:
        prefix = f"model.layers.1.self_attn.{part}_proj"
        values = torch.from_numpy(x) @ reference[f"{prefix}.weight"].T + reference[f"{prefix}.bias"]
        return values.reshape(1, 7, -1, 16).transpose(1, 2)

    rotary = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    cos, sin = rotary(torch.from_numpy(x), torch.from_numpy(positions)[None])
    q, k = apply_rotary_pos_emb(theirs_of("q"), theirs_of("k"), cos, sin)
    theirs = (q @ k.repeat_interleave(2, dim=1).transpose(2, 3))[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


def test_rows_packed_in_pieces_are_the_same(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(dtype="bfloat16")
    names = ("embed", "layers.0.q", "layers.0.k", "layers.0.down")
    whole = {name: open_source(folder).tensor(name).packed(Kind.Q8) for name in names}
    monkeypatch.setattr(source_module, "CHUNK", 64 * 20)
    for name in names:
        np.testing.assert_array_equal(open_source(folder).tensor(name).packed(Kind.Q8), whole[name])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_norm.weight", (16,)),
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.1.mlp.down_proj.bias", (64,)),
        ("model.layers.0.input_layernorm.bias", (64,)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 64)),
        ("model.layers.2.mlp.up_proj.weight", (96, 64)),
        ("model.layers.0.self_attn.q_proj.weight_scale", ()),
        ("vision_tower.patch.weight", (8, 8)),
        ("lm_head.bias", (300,)),
        ("embed_tokens.weight", (300, 64)),
    ],
)
def test_weights_that_are_not_the_model_s(tiny_llama: Make, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    folder = changed(tiny_llama(), tmp_path / "copy", lambda tensors: tensors | {name: torch.ones(shape)})
    with pytest.raises(ModelError, match=rf"tensor {name} does not belong to the llama model of 2 layers that config"):
        open_source(folder)


def test_buffers_of_old_checkpoints_are_passed_over(tiny_llama: Make, tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    buffers["model.rotary_emb.inv_freq"] = torch.ones(8)
    folder = changed(tiny_llama(), tmp_path / "copy", lambda tensors: tensors | buffers)
    assert open_source(folder).names() == open_source(tiny_llama()).names()


@pytest.mark.parametrize("other", [False, True])
def test_a_head_beside_tied_embeddings(tiny_llama: Make, tmp_path: Path, other: bool) -> None:
    """Like transformers: tied if it is the embedding, else the head that it is."""
    embed = "model.embed_tokens.weight"
    folder = changed(
        tiny_llama(tie_word_embeddings=True),
        tmp_path / "copy",
        lambda tensors: tensors | {"lm_head.weight": tensors[embed].clone() + (1 if other else 0)},
    )
    source = open_source(folder)
    assert ("head" in source.names()) == other
    assert len(source.notes) == other
    theirs = state(folder)["lm_head.weight"]
    np.testing.assert_array_equal(source.tensor("head" if other else "embed").float32(), theirs)


def test_a_folder_of_the_base_class(tiny_llama: Make, tmp_path: Path) -> None:
    """Without a head of its own the model writes by the embedding, or cannot write."""
    for tied in (True, False):
        plain = tiny_llama(tie_word_embeddings=tied)
        folder = Path(shutil.copytree(plain, tmp_path / f"base-{tied}"))
        transformers.LlamaModel.from_pretrained(plain).save_pretrained(folder)
        assert "embed_tokens.weight" in safetensors.torch.load_file(folder / "model.safetensors")
        if not tied:
            with pytest.raises(
                ModelError, match=r"tensor lm_head\.weight is missing; a model without a head writes no"
            ):
                open_source(folder)
            continue
        source, expected, theirs = open_source(folder), open_source(plain), state(folder)
        assert source.names() == expected.names()
        for name in source.names():
            np.testing.assert_array_equal(source.tensor(name).float32(), expected.tensor(name).float32())
        np.testing.assert_array_equal(theirs["lm_head.weight"], source.tensor("embed").float32())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["embed_tokens", "norm", "layers.1.mlp.down_proj", "layers.0.self_attn.k_proj"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_that_are_not_finite(tiny_llama: Make, tmp_path: Path, name: str, value: float, dtype: str) -> None:
    """Named when the tensor is read, whatever it is packed as."""

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"model.{name}.weight"].view(-1)[37] = value
        return tensors

    source = open_source(changed(tiny_llama(dtype=dtype), tmp_path / "copy", spoil))
    ours = {"embed_tokens": "embed", "norm": "norm", "layers.1.mlp.down_proj": "layers.1.down"}.get(name, "layers.0.k")
    message = rf"model\.safetensors: tensor model\.{name}\.weight holds NaN or infinity; if"
    with pytest.raises(ModelError, match=message):
        source.tensor(ours).float32()
    for kind in () if name == "norm" else (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8, Kind.Q4, Kind.Q4S):
        with pytest.raises(ModelError, match=message):
            source.tensor(ours).packed(kind)


def test_every_nan_is_seen(tiny_llama: Make, tmp_path: Path) -> None:
    """Also those whose upper half, rounded, is a number."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    for i, nan in enumerate(bits.view(torch.float32)):
        folder = changed(
            tiny_llama(), tmp_path / str(i), lambda t, nan=nan: t | {"lm_head.weight": nan.expand(300, 64).contiguous()}
        )
        with pytest.raises(ModelError, match=r"tensor lm_head\.weight holds NaN"):
            open_source(folder).tensor("head").packed(Kind.BF16)


@pytest.mark.parametrize(
    ("value", "kind", "good"),
    [
        (65519.0, Kind.F16, True),
        (65520.0, Kind.F16, False),
        (-1e10, Kind.F16, False),
        (3.39e38, Kind.BF16, True),
        (3.4e38, Kind.BF16, False),
        (1e38, Kind.F32, True),
        (8e6, Kind.Q8, True),
        (9e6, Kind.Q8, False),
        (5e5, Kind.Q4S, True),
        (-6e5, Kind.Q4S, False),
        (9e5, Kind.Q4, True),
        (1e6, Kind.Q4, False),
        (-7e4, Kind.Q4, False),
    ],
)
def test_weights_that_a_type_cannot_hold(
    tiny_llama: Make, tmp_path: Path, value: float, kind: Kind, good: bool
) -> None:
    """Never infinity in silence."""

    def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["lm_head.weight"][299, 63] = value
        return tensors

    head = open_source(changed(tiny_llama(), tmp_path / "copy", widen)).tensor("head")
    if good:
        assert unpack(head.packed(kind), kind, 64)[299, 63] == pytest.approx(value, rel=0.05)
    else:
        name = kind.name.lower()
        with pytest.raises(
            ModelError, match=rf"tensor lm_head\.weight holds .* too large for {name}: --dtype f32 keeps"
        ):
            head.packed(kind)


def test_unsupported_tensor_type(tiny_llama: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = edited(tiny_llama(), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has type F8_E4M3"):
        open_source(folder)
