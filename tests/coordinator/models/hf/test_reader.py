"""Hugging Face folders against transformers. Run: pytest tests/coordinator/models/hf/test_reader.py"""

import json
import os
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
from tokenizers import Tokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from warmfront.coordinator.models import source as source_module
from warmfront.coordinator.models.families import FAMILIES
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.models.source import Source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack
from warmfront.shared.model.spec import Predictor

Floats = npt.NDArray[np.float32]
Make = Callable[..., Path]
# The names of a layer's tensors, as in `model.layers.0.NAME.weight`.
PARTS = {
    part: hf.removeprefix("model.layers.{i}.") for part, (hf, _) in FAMILIES["llama"].tensors.items() if "{i}" in hf
}
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


def frequencies_of(source: Source) -> tuple[float, ...]:
    """Of the one rotary table that all layers have."""
    (rotary,) = source.spec.architecture.positions.rotary
    return rotary.frequencies


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


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3])
def test_rope_frequencies(tiny_llama: Make, tmp_path: Path, rope: dict[str, Any] | None) -> None:
    folder = tiny_llama(rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder)).inv_freq.numpy()
    assert frequencies_of(open_source(folder)) == pytest.approx(theirs, rel=1e-5)
    # As transformers wrote it before version 5.
    settings = dict(rope or {"rope_theta": 10000.0})
    old = {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings or None}
    if settings:
        settings["type"] = settings.pop("rope_type")
    older = edited(folder, tmp_path / "older", rope_parameters=None, **old)
    assert frequencies_of(open_source(older)) == pytest.approx(theirs, rel=1e-5)


def test_spec(tiny_llama: Make) -> None:
    folder = tiny_llama(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, num_key_value_heads=4, head_dim=24)
    source = open_source(folder)
    spec, architecture = source.spec, source.spec.architecture
    attention, activation = architecture.attention, architecture.feed_forward.activation
    assert (spec.layers, spec.hidden, spec.ffn) == (2, 64, 96)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 4, 24)
    assert (spec.family, activation, spec.context, architecture.norm.epsilon) == ("llama", "gelu_tanh", 512, 1e-6)
    assert spec.vocab == source.tensor("embed").shape[0]
    assert "head" not in source.names()
    assert source.tensor("layers.0.o").shape == (64, 96)
    for name, meant in (("relu", "relu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("silu", "silu")):
        assert open_source(tiny_llama(hidden_act=name)).spec.architecture.feed_forward.activation == meant


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
        ({"rope_parameters": {"rope_type": "linear"}}, "field rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of the head"),
        ({"hidden_size": None}, "field hidden_size is missing"),
        ({"hidden_size": "wide"}, "field hidden_size is 'wide', not a whole number from 1 to"),
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "field num_attention_heads is 0"),
        ({"rope_parameters": [1]}, r"field rope_parameters is \[1\], not an object"),
        ({"hidden_size": 72, "head_dim": 16}, "hidden size 72 is not a multiple of 32"),
        ({"head_dim": 20, "hidden_size": 64}, "heads x head size 80 is not a multiple of 32"),
        ({"head_dim": 4, "num_attention_heads": 16}, "head size 4 is not a multiple of 8"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"num_key_value_heads": 3}, "do not share"),
        ({"model_type": ["llama"]}, r"field model_type is \['llama'\], not a text"),
        ({"hidden_act": ["silu"]}, r"field hidden_act is \['silu'\], not a text"),
        ({"hidden_act": {"a": 1}}, "field hidden_act is {'a': 1}, not a text"),
        ({"quantization_config": [1]}, r"field quantization_config is \[1\], not an object"),
        ({"quantization_config": "gptq"}, "field quantization_config is 'gptq', not an object"),
        ({"quantization_config": {"quant_method": 5}}, "field quantization_config.quant_method is 5, not a text"),
        ({"head_dim": 10**12}, "field head_dim is 1000000000000, not a whole number from 1 to 2147483647"),
        ({"head_dim": 10**9}, r"q_proj\.weight has shape \(64, 64\), config\.json says \(4000000000, 64\)"),
        ({"head_dim": 16.0}, r"field head_dim is 16\.0, not a whole number"),
        ({"head_dim": True}, "field head_dim is True, not a whole number"),
        ({"num_attention_heads": 128, "head_dim": None}, "heads x head size 0|head size 0 is not a multiple of 8"),
        ({"num_hidden_layers": 2**31 - 1}, "layers.2.input_layernorm.weight is missing"),
        ({"vocab_size": 10**30}, "field vocab_size is 1000"),
        ({"max_position_embeddings": -1}, "field max_position_embeddings is -1"),
        ({"rms_norm_eps": float("nan")}, "field rms_norm_eps is nan, not a positive number"),
        ({"rms_norm_eps": float("inf")}, "field rms_norm_eps is inf, not a positive number"),
        ({"rms_norm_eps": -1e-6}, "field rms_norm_eps is -1e-06, not a positive number"),
        ({"rms_norm_eps": 0}, "field rms_norm_eps is 0, not a positive number"),
        ({"rms_norm_eps": 1e-60}, "field rms_norm_eps is 1e-60, not a positive number"),
        ({"rms_norm_eps": "1e-6"}, "field rms_norm_eps is '1e-6', not a positive number"),
        ({"rms_norm_eps": 10**400}, "field rms_norm_eps is 1000"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "field rope_parameters.rope_theta is nan"),
        ({"rope_parameters": {"rope_theta": 0}}, "field rope_parameters.rope_theta is 0"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "field rope_parameters.rope_theta is -1"),
        ({"rope_parameters": {"rope_theta": [1]}}, "field rope_parameters.rope_theta is"),
        ({"rope_parameters": None, "rope_theta": float("inf")}, "field rope_theta is inf"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "field rope_parameters.rope_type is"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "field rope_parameters.factor is 0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "field rope_parameters.factor is nan"),
        ({"rope_parameters": LLAMA3 | {"factor": -8.0}}, "field rope_parameters.factor is -8"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor is 4.0, not below high_freq_factor, 4",
        ),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": -1}}, "original_max_position_embeddings is"),
        ({"partial_rotary_factor": 0.5}, "part of the head"),
        ({"attention_bias": "yes"}, "field attention_bias is 'yes', not true or false"),
        ({"tie_word_embeddings": 1}, "field tie_word_embeddings is 1, not true or false"),
        ({"bos_token_id": "0"}, "field bos_token_id is '0', not a token id below 300"),
        *(
            (
                {"eos_token_id": value},
                r"config\.json: field eos_token_id is .*, not a token id below 300 or a list of them",
            )
            for value in (-7, 300, 10**20, 2.5, True, "2", [[2]], [1, "2"], {"a": 1}, [None])
        ),
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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"a":' * 100_000, "is not JSON"),
        ("config.json", '{"a": 1' + "0" * 5000 + "}", "is not JSON"),
        ("config.json", b"\xff\xfe{\0}\0", "is not UTF-8"),
        ("config.json", b'{"model_type": "lla\xffma"}', "is not UTF-8"),
        ("tokenizer_config.json", "5", "is not a JSON object"),
        ("tokenizer_config.json", {"bos_token": 5}, "field bos_token is 5, not a text"),
        ("tokenizer_config.json", {"eos_token": ["a"]}, r"field eos_token is \['a'\], not a text"),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}, "field eos_token.content is 5, not a text"),
        ("tokenizer_config.json", {"eos_token": {}}, "field eos_token.content is missing"),
        ("tokenizer_config.json", {"add_bos_token": "no"}, "field add_bos_token is 'no', not true or false"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"field added_tokens_decoder is \[1\], not an object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"7": {}}},
            "field added_tokens_decoder.7.content is missing",
        ),
        ("tokenizer_config.json", {"chat_template": 5}, "field chat_template is 5, not a text"),
        ("tokenizer_config.json", {"chat_template": {"a": "b"}}, "field chat_template is {'a': 'b'}, not a text"),
        ("tokenizer_config.json", {"chat_template": [5]}, r"field chat_template is \[5\], not a list of objects"),
        ("tokenizer_config.json", {"chat_template": [["a"]]}, "not a list of objects"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, r"chat_template\[0\].template is missing"),
        ("tokenizer_config.json", {"chat_template": [{"name": 1, "template": ""}]}, r"chat_template\[0\].name is 1"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8"),
        ("generation_config.json", {"eos_token_id": [1, "2"]}, "field eos_token_id is"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "field eos_token_id is"),
        ("generation_config.json", {"eos_token_id": 300}, "field eos_token_id is 300, not a token id below 300"),
        ("tokenizer.json", b"\xff", "is not UTF-8"),
        ("tokenizer.json", "[" * 100_000, "is not a tokenizer"),
    ],
)
def test_malformed_files_are_refused(tiny_llama: Make, tmp_path: Path, file: str, content: Any, message: str) -> None:
    """In one line that names the file, and where there is one the field."""
    folder = edited(tiny_llama(), tmp_path / "copy")
    if isinstance(content, dict):
        content = json.dumps(content)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message) as caught:
        open_source(folder)
    assert str(caught.value).startswith(str(folder / file))
    assert str(caught.value).isprintable()


def test_byte_order_marks_are_passed_over(tiny_llama: Make, tmp_path: Path) -> None:
    """Windows editors write them; what follows is read as without."""
    folder = edited(tiny_llama(max_shard_size="60KB"), tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    plain = open_source(folder)
    for file in [*folder.glob("*.json"), folder / "chat_template.jinja"]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = open_source(folder)
    assert (marked.spec, marked.tokenizer) == (plain.spec, plain.tokenizer)


def test_a_text_file_of_no_sane_size(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    for file in ("tokenizer.json", "config.json"):
        os.truncate(folder / file, 1 << 40)
        with pytest.raises(ModelError, match=rf"{file} is larger than any such file; fetch it again"):
            open_source(folder)


def indexed(folder: Path, target: Path, file: Any) -> Path:
    """A copy whose index says that every tensor is in `file`; the weights themselves are moved to `weights`."""
    copy = edited(folder, target)
    (copy / "model.safetensors").rename(copy / "weights")
    names = safetensors.torch.load_file(copy / "weights")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    return copy


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", r"does not lie in the model's folder; copy it there"),
        ("../copy/weights", r"does not lie in the model's folder"),
        ("sub/weights", "does not lie in the model's folder"),
        ("..", "does not lie in the model's folder"),
        (".", "does not lie in the model's folder"),
        ("", "does not lie in the model's folder"),
        ("/etc/passwd", "does not lie in the model's folder"),
        ("../pipe", "does not lie in the model's folder"),
        ("/dev/zero", "does not lie in the model's folder"),
        ("a" * 300, "cannot be a file of the model .*File name too long"),
        ("\0", "cannot be a file of the model .*null"),
        ("\ud800", "cannot be a file of the model"),
        ("circle", "cannot be a file of the model .*circle"),
        ("none.safetensors", "cannot read .*none.safetensors: No such file"),
        ("sub", "sub is not a regular file"),
        (5, r"field weight_map\..* is 5, not a text"),
        ([], r"field weight_map\..* is \[\], not a text"),
        ({"a": 1}, r"field weight_map\..* is \{'a': 1\}, not a text"),
        (None, r"field weight_map\..* is missing"),
    ],
)
def test_files_that_an_index_may_not_name(tiny_llama: Make, tmp_path: Path, file: Any, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    folder = indexed(tiny_llama(), tmp_path / "copy", file)
    (folder / "sub").mkdir()
    (folder / "circle").symlink_to("circle")
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "weights"):
        shutil.copy(folder / "weights", place)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}', '{"weight_map": {}}'])
def test_an_index_of_no_weights(tiny_llama: Make, tmp_path: Path, content: str) -> None:
    folder = indexed(tiny_llama(), tmp_path / "copy", "weights")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json|incomplete|is missing"):
        open_source(folder)


def test_links_stay_in_the_folder(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert open_source(folder).spec.layers == 2
    (folder / "weights").rename(tmp_path / "weights")
    for target in (tmp_path / "weights", "../weights", "/dev/zero"):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)
        with pytest.raises(ModelError, match=r"model\.safetensors (does not lie in the model's folder|is a pipe or)"):
            open_source(folder)
    shutil.move(tmp_path / "weights", folder / "moved")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("moved")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json does not lie in the model's folder"):
        open_source(folder)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}])
def test_snapshots_of_the_hub_s_cache(tiny_llama: Make, tmp_path: Path, shards: dict[str, str]) -> None:
    """Their files are links to the blobs of the same repository, and only of it."""
    plain = tiny_llama(**shards)
    repository = tmp_path / "hub" / "models--a--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{i:040x}"))
    (tmp_path / "link").symlink_to(snapshot)
    expected = open_source(plain)
    for path in (snapshot, tmp_path / "link"):
        source = open_source(path)
        assert replace(source.spec, name="") == replace(expected.spec, name="")
        np.testing.assert_array_equal(
            source.tensor("layers.1.down").float32(), expected.tensor("layers.1.down").float32()
        )
    (repository / "blobs").rename(tmp_path / "blobs")
    (repository / "blobs").symlink_to(tmp_path / "blobs")
    other = tmp_path / "hub" / "models--b--tiny" / "blobs"
    other.mkdir(parents=True)
    (repository / "blobs").unlink()
    (tmp_path / "blobs").rename(repository / "blobs")
    target = (snapshot / "config.json").resolve()
    shutil.move(target, other / "1")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(Path("..", "..", "..", "models--b--tiny", "blobs", "1"))
    with pytest.raises(ModelError, match=r"config\.json does not lie in the model's folder"):
        open_source(snapshot)


def changed(
    folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]], **config: Any
) -> Path:
    """A copy with other weights, and fields of config.json replaced."""
    copy = edited(folder, target, **config)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    safetensors.torch.save_file(change(tensors), copy / "model.safetensors", {"format": "pt"})
    return copy


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


def test_weights_of_a_shard_that_the_index_does_not_name(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(max_shard_size="60KB"), tmp_path / "copy")
    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = safetensors.torch.load_file(shards[0])
    safetensors.torch.save_file(tensors | {"more": torch.ones(3)}, shards[0], {"format": "pt"})
    with pytest.raises(ModelError, match="tensor more does not belong to the llama model"):
        open_source(folder)
    first = next(iter(tensors))
    again = safetensors.torch.load_file(shards[1]) | {first: tensors[first]}
    safetensors.torch.save_file(again, shards[1], {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{shards[1].name}: tensor {first} is in another file too"):
        open_source(folder)


def test_buffers_of_old_checkpoints_are_passed_over(tiny_llama: Make, tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    buffers["model.rotary_emb.inv_freq"] = torch.ones(8)
    folder = changed(tiny_llama(), tmp_path / "copy", lambda tensors: tensors | buffers)
    assert open_source(folder).names() == open_source(tiny_llama()).names()


def test_an_adapter_is_not_passed_over(tiny_llama: Make, tmp_path: Path) -> None:
    """transformers would add it to the weights."""
    folder = edited(tiny_llama(), tmp_path / "copy")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="has an adapter, which is not supported; merge it into the model's weights"):
        open_source(folder)


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


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_begin_or_end_beyond_the_embedding(tiny_llama: Make, tmp_path: Path, role: str) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    settings = {role: "<|new|>", "added_tokens_decoder": {"300": {"content": "<|new|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=rf"field {role} is '<\|new\|>', not one of the 300 tokens that the weights"):
        open_source(folder)


def test_tokens_that_only_the_settings_have(tiny_llama: Make, tmp_path: Path) -> None:
    """transformers adds them to those of tokenizer.json; the end token that they name ends answers."""
    folder = edited(tiny_llama(), tmp_path / "copy", vocab_size=310, eos_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    word = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(270)
    spaces = {"lstrip": False, "rstrip": False, "single_word": False}
    added = {
        "2": {"content": "<|im_end|>", "special": True, "normalized": False} | spaces,
        "270": {"content": word, "special": True, "normalized": False} | spaces,
        "300": {"content": "<|user|>", "special": True, "normalized": False} | spaces,
        "301": {"content": "warm", "special": False, "normalized": True} | spaces | {"lstrip": True},
        "302": {"content": "<|stop|>", "special": True, "normalized": False} | spaces,
    }
    settings |= {"added_tokens_decoder": added, "eos_token": "<|stop|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(310, 64)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files, theirs = open_source(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    assert files is not None
    ours = Tokenizer.from_str(files.json)
    for text in ("<|user|>The lighthouse keeper  warm<|stop|> front<|im_end|>", "lukewarm water", f"a{word} b"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    assert files.eos_id == theirs.eos_token_id == 302
    assert set(files.eos_ids) == {0, 2, 302}


def test_begin_token_of_the_post_processor(tiny_llama: Make, tmp_path: Path) -> None:
    from tokenizers import processors

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
