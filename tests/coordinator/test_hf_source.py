"""Hugging Face folders against transformers. Run: pytest tests/coordinator/test_hf_source.py"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from warmfront.coordinator import source as source_module
from warmfront.coordinator.hf_source import PARTS
from warmfront.coordinator.source import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model import Predictor
from warmfront.shared.weights import Kind, unpack

Floats = npt.NDArray[np.float32]
Make = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


def state(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.state_dict())


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the folder with fields of config.json replaced; None removes one."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


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
        angle = positions[:, None] * np.array(source.spec.rope_frequencies)
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


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3])
def test_rope_frequencies(tiny_llama: Make, tmp_path: Path, rope: dict[str, Any] | None) -> None:
    folder = tiny_llama(rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder)).inv_freq.numpy()
    assert open_source(folder).spec.rope_frequencies == pytest.approx(theirs, rel=1e-5)
    # As transformers wrote it before version 5.
    settings = dict(rope or {"rope_theta": 10000.0})
    old = {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings or None}
    if settings:
        settings["type"] = settings.pop("rope_type")
    older = edited(folder, tmp_path / "older", rope_parameters=None, **old)
    assert open_source(older).spec.rope_frequencies == pytest.approx(theirs, rel=1e-5)


def test_spec(tiny_llama: Make) -> None:
    folder = tiny_llama(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, num_key_value_heads=4, head_dim=24)
    source = open_source(folder)
    spec = source.spec
    assert (spec.layers, spec.hidden, spec.ffn, spec.heads, spec.kv_heads, spec.head_dim) == (2, 64, 96, 4, 4, 24)
    assert (spec.architecture, spec.activation, spec.context, spec.norm_eps) == ("llama", "gelu_tanh", 512, 1e-6)
    assert spec.vocab == source.tensor("embed").shape[0]
    assert "head" not in source.names()
    assert source.tensor("layers.0.o").shape == (64, 96)
    for name, meant in (("relu", "relu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("silu", "silu")):
        assert open_source(tiny_llama(hidden_act=name)).spec.activation == meant


def test_rows_packed_in_pieces_are_the_same(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(dtype="bfloat16")
    names = ("embed", "layers.0.q", "layers.0.k", "layers.0.down")
    whole = {name: open_source(folder).tensor(name).packed(Kind.Q8) for name in names}
    monkeypatch.setattr(source_module, "CHUNK", 64 * 20)
    for name in names:
        np.testing.assert_array_equal(open_source(folder).tensor(name).packed(Kind.Q8), whole[name])


def test_sharded_folder(tiny_llama: Make) -> None:
    folder = tiny_llama(max_shard_size="60KB")
    assert not (folder / "model.safetensors").exists()
    whole, sharded = open_source(tiny_llama()), open_source(folder)
    assert whole.names() == sharded.names()
    for name in whole.names():
        np.testing.assert_array_equal(sharded.tensor(name).float32(), whole.tensor(name).float32())
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    hidden = shard.rename(shard.with_suffix(".hidden"))
    try:
        with pytest.raises(ModelError, match=shard.name):
            open_source(folder)
    finally:
        hidden.rename(shard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model type 'qwen2' is not supported; llama is"),
        ({"hidden_act": "fatrelu"}, "activation 'fatrelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of the head"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "wide"}, "not a llama configuration"),
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "not a llama configuration"),
        ({"rope_parameters": [1]}, "not a llama configuration"),
        ({"hidden_size": 72, "head_dim": 16}, "hidden size 72 is not a multiple of 32"),
        ({"head_dim": 20, "hidden_size": 64}, "heads x head size 80 is not a multiple of 32"),
        ({"head_dim": 4, "num_attention_heads": 16}, "head size 4 is not a multiple of 8"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"num_key_value_heads": 3}, "do not share"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight"),
        ({"intermediate_size": 128}, r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \(96, 64\)"),
        ({"mlp_bias": True}, r"model\.layers\.0\.mlp\.gate_proj\.bias"),
    ],
)
def test_unsupported_configs_are_refused(
    tiny_llama: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(edited(tiny_llama(), tmp_path / "edited", **changes))


def with_predictor(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, folder / "predictor.safetensors", metadata)
    return folder


def predictors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of rank 40 and 7, for `tiny_llama`."""
    generator = torch.Generator().manual_seed(3)
    shapes = {f"layers.{i}.fc1.weight": (rank, 64) for i, rank in enumerate((40, 7))}
    shapes |= {f"layers.{i}.fc2.weight": (96, rank) for i, rank in enumerate((40, 7))}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, Kind.F32), (torch.float16, Kind.F16), (torch.bfloat16, Kind.BF16)]
)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}])
def test_predictors(tiny_llama: Make, tmp_path: Path, dtype: torch.dtype, kind: Kind, shards: dict[str, str]) -> None:
    folder = edited(tiny_llama(**shards), tmp_path / "copy")
    plain = open_source(folder)
    assert plain.spec.predictor is None
    tensors = predictors(dtype)
    metadata = {"input": "normed", "activation": "none", "threshold": "-1.5", "format": "pt"}
    source = open_source(with_predictor(folder, tensors, metadata))
    assert source.spec == replace(plain.spec, predictor=Predictor(input="normed", activation="none", threshold=-1.5))
    assert source.names() - plain.names() == {f"layers.{i}.{part}" for i in (0, 1) for part in ("fc1", "fc2")}
    for name, values in tensors.items():
        tensor = source.tensor(name.removesuffix(".weight"))
        assert (tensor.shape, tensor.kind) == (tuple(values.shape), kind)
        np.testing.assert_array_equal(tensor.float32(), values.float())
        columns = -(-values.shape[1] // 32) * 32
        whole = unpack(tensor.packed(kind), kind, columns)
        np.testing.assert_array_equal(whole, np.pad(values.float(), ((0, 0), (0, columns - values.shape[1]))))


def test_predictor_settings_are_optional(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    for metadata in (None, {}, {"threshold": "0"}):
        source = open_source(with_predictor(folder, predictors(), metadata))
        assert source.spec.predictor == Predictor(input="residual", activation="relu", threshold=0.0)


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        ({"input": "gate"}, {}, "predictor input 'gate' is not supported; residual and normed are"),
        ({"activation": "silu"}, {}, "predictor activation 'silu' is not supported; relu and none are"),
        ({"threshold": "low"}, {}, "threshold 'low' is not a number; write one like 0.5"),
        ({"threshold": "nan"}, {}, "predictor threshold nan is not a number"),
        ({}, {"layers.1.fc1.weight": None}, "tensor layers.1.fc1.weight is missing; make predictors for every layer"),
        ({}, {"layers.0.fc2.weight": None}, "tensor layers.0.fc2.weight is missing"),
        (
            {},
            {"layers.0.fc1.weight": (40, 32)},
            r"tensor layers.0.fc1.weight has shape \(40, 32\) instead of \(40, 64\); it is",
        ),
        ({}, {"layers.0.fc1.weight": (0, 64)}, r"tensor layers.0.fc1.weight has shape \(0, 64\)"),
        ({}, {"layers.0.fc1.weight": ()}, r"tensor layers.0.fc1.weight has shape \(\)"),
        ({}, {"layers.1.fc2.weight": (7, 96)}, r"tensor layers.1.fc2.weight has shape \(7, 96\) instead of \(96, 7\)"),
        ({}, {"layers.2.fc1.weight": (7, 64)}, "tensor layers.2.fc1.weight is unknown"),
        ({}, {"layers.0.fc1.bias": (40,)}, "tensor layers.0.fc1.bias is unknown"),
        ({}, {"layers.0.fc1": (40, 64)}, "tensor layers.0.fc1 is unknown"),
    ],
)
def test_predictors_that_are_refused(
    tiny_llama: Make,
    tmp_path: Path,
    metadata: dict[str, str],
    changes: dict[str, tuple[int, ...] | None],
    message: str,
) -> None:
    tensors = predictors()
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    folder = with_predictor(edited(tiny_llama(), tmp_path / "copy"), tensors, metadata)
    with pytest.raises(ModelError, match=rf"predictor\.safetensors: {message}") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_predictors_of_integers_or_damaged(tiny_llama: Make, tmp_path: Path) -> None:
    folder = with_predictor(edited(tiny_llama(), tmp_path / "copy"), predictors(torch.int8))
    with pytest.raises(
        ModelError, match=r"tensor layers\.0\.fc1\.weight has type I8; save it as one of F32, F16, BF16$"
    ):
        open_source(folder)
    (folder / "predictor.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"predictor\.safetensors is damaged \(.*\); make it anew or remove it$"):
        open_source(folder)


def test_predictors_alone_are_no_model(tiny_llama: Make, tmp_path: Path) -> None:
    folder = with_predictor(edited(tiny_llama(), tmp_path / "copy"), predictors())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        open_source(folder)


def test_damaged_folders_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for length in (0, 5, 300, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            open_source(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        open_source(folder)
    for broken in ("{", "[]"):
        (folder / "config.json").write_text(broken)
        with pytest.raises(ModelError, match=r"config\.json is not"):
            open_source(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_source(folder)


def test_unsupported_tensor_type(tiny_llama: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = edited(tiny_llama(), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has type F8_E4M3"):
        open_source(folder)


def test_tokenizer(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    files = open_source(folder).tokenizer
    assert files is not None
    assert files.json == (folder / "tokenizer.json").read_text()
    assert files.bos_id == theirs.bos_token_id
    assert files.chat_template == theirs.chat_template
    assert set(files.eos_ids) == set(theirs.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert files.add_bos is False

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}
    settings["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    files = open_source(folder).tokenizer
    assert files is not None
    assert (files.bos_id, files.add_bos, files.chat_template) == (1, True, "yes")
    assert set(files.eos_ids) == {0, 2, 7, 9}
    (folder / "chat_template.jinja").write_text("from the file")
    reopened = open_source(folder).tokenizer
    assert reopened is not None
    assert reopened.chat_template == "from the file"


def test_begin_token_of_the_post_processor(tiny_llama: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = edited(tiny_llama(), tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    files = open_source(folder).tokenizer
    assert files is not None
    assert (files.bos_id, files.add_bos) == (0, True)


def test_without_or_with_a_broken_tokenizer(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        open_source(folder)
    (folder / "tokenizer.json").unlink()
    assert open_source(folder).tokenizer is None
