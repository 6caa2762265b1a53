"""GGUF files against the gguf package's own dequantisation. Run: pytest tests/coordinator/models/gguf/test_reader.py"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import GGUF_SHAPES
from warmfront.coordinator.models import source as source_module
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack
from warmfront.shared.model.spec import Predictor

Floats = npt.NDArray[np.float32]
Make = Callable[..., Path]
NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "layers.0.attn_norm": "blk.0.attn_norm",
    "layers.0.q": "blk.0.attn_q",
    "layers.0.k": "blk.0.attn_k",
    "layers.0.v": "blk.0.attn_v",
    "layers.0.o": "blk.0.attn_output",
    "layers.0.ffn_norm": "blk.0.ffn_norm",
    "layers.0.gate": "blk.0.ffn_gate",
    "layers.0.up": "blk.0.ffn_up",
    "layers.0.down": "blk.0.ffn_down",
}
EXACT = {
    "F32": Kind.F32,
    "F16": Kind.F16,
    "BF16": Kind.BF16,
    "Q8_0": Kind.Q8,
    "Q4_0": Kind.Q4S,
    "Q4_1": Kind.Q4,
}
ROUNDED = {
    "Q5_0": Kind.Q8,
    "Q5_1": Kind.Q8,
    "Q5_K": Kind.Q8,
    "Q6_K": Kind.Q8,
    "Q2_K": Kind.Q4,
    "Q3_K": Kind.Q4,
    "IQ4_NL": Kind.Q4,
}


def expected(path: Path) -> dict[str, Floats]:
    """Every tensor by canonical name as the gguf package reads it, down transposed."""
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    named = {name: values[f"{published}.weight"] for name, published in NAMES.items()}
    named["layers.0.down"] = named["layers.0.down"].T
    return named


def bound(values: Floats, kind: Kind) -> Floats:
    """Half a step of the 32-blocks' grid, and what rounding scales to float16 adds."""
    blocks = values.reshape(len(values), -1, 32)
    reach = np.abs(blocks).max(2) if kind == Kind.Q8 else blocks.max(2) - blocks.min(2)
    half_step = reach / (254 if kind == Kind.Q8 else 30)
    slack = (np.abs(blocks).max(2) + reach) * 2**-10
    return np.broadcast_to((half_step + slack)[:, :, None], blocks.shape).reshape(values.shape)


def columns(tensor: source_module.SourceTensor) -> Floats:
    """What a Q4C tensor holds: its numbers by the scales and minima of each 32 rows."""
    rows, cols = tensor.shape
    nibbles = tensor.packed(Kind.Q4C).reshape(rows, cols // 32, 16)
    numbers = np.concatenate((nibbles & 15, nibbles >> 4), axis=2).reshape(-1, 32, cols).astype(np.float32)
    scale, minimum = tensor.column_scales().astype(np.float32).swapaxes(0, 1)[:, :, None]
    return (numbers * scale + minimum).reshape(rows, cols)


@pytest.mark.parametrize("kind", [*EXACT, "Q4_K", *ROUNDED])
def test_float32_is_what_the_gguf_package_reads(tiny_gguf: Make, kind: str) -> None:
    path = tiny_gguf(kind=kind)
    source = open_source(path)
    reference = expected(path)
    assert source.names() == reference.keys()
    for name, values in reference.items():
        tensor = source.tensor(name)
        assert tensor.shape == values.shape, name
        np.testing.assert_array_equal(tensor.float32(), values, err_msg=name)


@pytest.mark.parametrize("kind", EXACT)
def test_exact_types_are_repacked_without_loss(tiny_gguf: Make, kind: str) -> None:
    path = tiny_gguf(kind=kind)
    source = open_source(path)
    for name, values in expected(path).items():
        tensor = source.tensor(name)
        if name == "layers.0.down" and kind.startswith("Q4"):
            assert tensor.kind == Kind.Q4C
            np.testing.assert_array_equal(columns(tensor), values)
        elif values.ndim == 2 and (name != "layers.0.down" or kind in ("F32", "F16", "BF16")):
            assert tensor.kind == EXACT[kind], name
            np.testing.assert_array_equal(unpack(tensor.packed(tensor.kind), tensor.kind, values.shape[1]), values)
    assert source.notes == (
        ["1 down matrices of type " + kind + " are turned and kept as Q8"] if kind == "Q8_0" else []
    )


def test_q4_0_is_exact_with_minima_too(tiny_gguf: Make) -> None:
    """As it is packed beside tensors that have minima of their own."""
    path = tiny_gguf(kind="Q4_0")
    source = open_source(path)
    for name, values in expected(path).items():
        if values.ndim == 2 and name != "layers.0.down":
            packed = source.tensor(name).packed(Kind.Q4)
            np.testing.assert_array_equal(unpack(packed, Kind.Q4, values.shape[1]), values)


@pytest.mark.parametrize("kind", ["Q4_K", *ROUNDED])
def test_other_types_are_rounded_to_the_nearest(tiny_gguf: Make, kind: str) -> None:
    path = tiny_gguf(kind=kind)
    source = open_source(path)
    for name, values in expected(path).items():
        tensor = source.tensor(name)
        if values.ndim == 2:
            wanted = ROUNDED.get(kind, Kind.Q4)
            if name == "layers.0.down":
                wanted = Kind.Q4C if kind == "Q4_K" else Kind.Q8
            assert tensor.kind == wanted, name
            if wanted == Kind.Q4C:
                assert np.abs(columns(tensor) - values).max() <= np.abs(values).max() * 2**-10
                continue
            error = np.abs(unpack(tensor.packed(wanted), wanted, values.shape[1]) - values)
            limit = np.abs(values).max() * 2**-10 if kind == "Q4_K" and wanted == Kind.Q4 else bound(values, wanted)
            assert (error <= limit).all(), name
    assert any(kind in note and "rounded" in note for note in source.notes)


def test_rows_packed_in_pieces_are_the_same(tiny_gguf: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(kind="Q4_K")
    whole = open_source(path)
    monkeypatch.setattr(source_module, "CHUNK", 100 * 256)
    pieces = open_source(path)
    for name in ("embed", "layers.0.gate", "layers.0.down"):
        for kind in (whole.tensor(name).kind, Kind.F16):
            np.testing.assert_array_equal(pieces.tensor(name).packed(kind), whole.tensor(name).packed(kind))


def test_smollm2_is_read_exactly(smollm2: Path) -> None:
    source = open_source(smollm2)
    spec, architecture = source.spec, source.spec.architecture
    attention = architecture.attention
    assert (spec.layers, spec.hidden, spec.ffn) == (30, 576, 1536)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (9, 3, 64)
    assert (spec.vocab, spec.context, architecture.feed_forward.activation) == (49152, 8192, "silu")
    assert architecture.norm.epsilon == pytest.approx(1e-5)
    assert "head" not in source.names()
    assert len(source.names()) == 2 + 9 * 30
    reference = {t.name: t for t in gguf.GGUFReader(smollm2).tensors}
    for name, kind in (("embed", Kind.Q8), ("layers.0.q", Kind.Q4), ("layers.0.up", Kind.Q4)):
        published = reference[f"{NAMES[name]}.weight"]
        tensor = source.tensor(name)
        assert tensor.kind == kind
        values = gguf.dequantize(published.data, published.tensor_type)
        np.testing.assert_array_equal(unpack(tensor.packed(kind), kind, 576), values)


def frequencies_of(path: Path) -> tuple[float, ...]:
    """Of the one rotary table that all layers have."""
    (rotary,) = open_source(path).spec.architecture.positions.rotary
    return rotary.frequencies


def test_rope_frequencies(tiny_gguf: Make) -> None:
    plain = 10000.0 ** (-np.arange(32) / 32)
    assert frequencies_of(tiny_gguf()) == pytest.approx(plain, rel=1e-12)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.rope.freq_base": 500.0}
    frequencies = frequencies_of(tiny_gguf(fields=linear))
    assert frequencies == pytest.approx(500.0 ** (-np.arange(32) / 32) / 4, rel=1e-12)
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = tiny_gguf(shapes={"rope_freqs.weight": (32,)}, values={"rope_freqs.weight": factors})
    assert frequencies_of(path) == pytest.approx(plain / factors, rel=1e-6)


def test_biases_and_head_are_found(tiny_gguf: Make) -> None:
    shapes = {"output.weight": (64, 256), "blk.0.attn_q.bias": (256,), "blk.0.ffn_down.bias": (256,)}
    path = tiny_gguf(kind="Q8_0", shapes=shapes)
    source = open_source(path)
    assert source.names() - NAMES.keys() == {"head", "layers.0.q.bias", "layers.0.down.bias"}
    assert source.tensor("layers.0.q.bias").kind == Kind.F32
    bias = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.bias")
    np.testing.assert_array_equal(source.tensor("layers.0.down.bias").float32(), bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported; llama is"),
        ({"fields": {"llama.expert_count": 8}}, "experts"),
        ({"fields": {"split.count": 2}}, "llama-gguf-split"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "RoPE scaling 'yarn'"),
        ({"fields": {"llama.rope.dimension_count": 32}}, "rope.dimension_count"),
        ({"fields": {"llama.attention.head_count_kv": 3}}, "do not share"),
        ({"fields": {"llama.attention.head_count": [4, 4]}}, "head_count is"),
        ({"fields": {"llama.block_count": 2}}, "layers.1.attn_norm is missing"),
        ({"without": ["llama.embedding_length"]}, "llama.embedding_length is missing"),
        ({"without": ["token_embd.weight"]}, "token_embd.weight is missing"),
        ({"without": ["blk.0.ffn_up.weight"]}, "layers.0.up is missing"),
        ({"shapes": {"blk.0.attn_k.weight": (256, 256)}}, "shape"),
        ({"shapes": {"blk.1.attn_k.weight": (128, 256)}}, "layers.1.k is unexpected"),
        ({"shapes": {"blk.0.fc1.weight": (256, 256)}}, "blk.0.fc1.weight does not belong to a llama model"),
        ({"shapes": {"blk.0.ffn_down_t.weight": (512, 256)}}, "blk.0.ffn_down.weight does not belong to a PowerInfer"),
        ({"shapes": {"blk.0.attn_sinks.weight": (4,)}}, "attn_sinks"),
        ({"shapes": {"rope_freqs.weight": (16,)}}, "rope_freqs.weight"),
        ({"fields": {"tokenizer.ggml.model": "bert"}}, "tokenizer 'bert' is not supported"),
        ({"shapes": {"blk.0.attn_norm.bias": (256,)}}, "layers.0.attn_norm.bias is unexpected"),
        ({"shapes": {"blk.0.ffn_norm.bias": (256,)}}, "layers.0.ffn_norm.bias is unexpected"),
        (
            {"fields": {"general.architecture": 5}, "architecture": "llama"},
            "field general.architecture is 5, not a text",
        ),
        ({"fields": {"general.name": 5}}, "field general.name is 5, not a text"),
        ({"fields": {"llama.block_count": 0}}, "field llama.block_count is 0, not a whole number from 1"),
        ({"fields": {"llama.block_count": 1.0}}, "field llama.block_count is 1.0, not a whole number"),
        ({"fields": {"llama.block_count": True}}, "field llama.block_count is True, not a whole number"),
        ({"fields": {"llama.block_count": 2**32 - 1}}, "field llama.block_count is 4294967295, not a whole number"),
        ({"fields": {"llama.attention.head_count": 0}}, "field llama.attention.head_count is 0"),
        ({"fields": {"llama.attention.head_count": 2**31 - 1}}, "head size 0 is not a multiple|x head size 0"),
        ({"fields": {"llama.attention.key_length": 2**31 - 8}}, r"shape \(256, 256\) instead of \(8589934560, 256\)"),
        ({"fields": {"llama.context_length": "long"}}, "field llama.context_length is 'long'"),
        *(
            ({"fields": {f"llama.{key}": value}}, rf"field llama\.{key} is .*, not a positive number$")
            for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear")
            for value in (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, "1", True, [1.0])
        ),
        (
            {"fields": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float("nan")}},
            "field llama.rope.scaling.factor is nan",
        ),
        ({"fields": {"llama.rope.scaling.type": 5}}, "field llama.rope.scaling.type is 5, not a text"),
        (
            {"shapes": {"rope_freqs.weight": (32,)}, "values": {"rope_freqs.weight": np.zeros(32, np.float32)}},
            "base and scaling factors give no positive frequencies",
        ),
        (
            {"shapes": {"rope_freqs.weight": (32,)}, "values": {"rope_freqs.weight": np.full(32, np.nan, np.float32)}},
            "rope_freqs.weight holds NaN",
        ),
        (
            {"shapes": {"rope_freqs.weight": (1, 32)}, "kinds": {"rope_freqs.weight": "Q8_0"}},
            r"rope_freqs.weight has shape \(1, 32\) and type Q8_0",
        ),
    ],
)
def test_unsupported_files_are_refused(tiny_gguf: Make, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(tiny_gguf(**options))


WORDS: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"w{i}" for i in range(64)],
    "tokenizer.ggml.scores": [-float(i) for i in range(64)],
    "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 61],
}
IDS = ("bos", "eos", "eot", "eom")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            (
                {f"tokenizer.ggml.{name}_token_id": value},
                rf"field tokenizer\.ggml\.{name}_token_id is .* token id below 64",
            )
            for name in IDS
            for value in (64, 2**31, 2**32 - 2, "two", 1.0, True, [2])
        ),
        ({"tokenizer.chat_template": 3}, "field tokenizer.chat_template is 3, not a text"),
        ({"tokenizer.ggml.add_bos_token": 1}, "field tokenizer.ggml.add_bos_token is 1, not true or false"),
        ({"tokenizer.ggml.add_space_prefix": "no"}, "add_space_prefix is 'no', not true or false"),
        ({"tokenizer.ggml.model": 5}, "field tokenizer.ggml.model is 5, not a text"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [1]}, "merges is .*, not a list of texts"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["w1 w9"], "tokenizer.ggml.pre": 5}, "pre is 5"),
        ({"tokenizer.ggml.tokens": [1] * 64}, "tokens is .*, not a list of texts"),
        ({"tokenizer.ggml.tokens": "w"}, "tokens is 'w', not a list of texts"),
        ({"tokenizer.ggml.tokens": ["w"] * 63}, "token_type is .*, not a list of 63 numbers"),
        ({"tokenizer.ggml.tokens": [*WORDS["tokenizer.ggml.tokens"][:63], "w" * 2000]}, "more than 1024 characters"),
        ({"tokenizer.ggml.scores": [1.0]}, r"scores is .*, not a list of 64 numbers"),
        ({"tokenizer.ggml.scores": [float("nan")] * 64}, "scores is .*, not a list of 64 numbers"),
        ({"tokenizer.ggml.token_type": ["1"] * 64}, "token_type is .*, not a list of 64 numbers"),
    ],
)
def test_tokenizers_that_are_refused(tiny_gguf: Make, fields: dict[str, Any], message: str) -> None:
    path = tiny_gguf(fields=WORDS | fields)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_more_tokens_than_the_embedding(tiny_gguf: Make) -> None:
    tokens = {"tokens": [f"w{i}" for i in range(65)], "scores": [0.0] * 65, "token_type": [1] * 65}
    path = tiny_gguf(fields=WORDS | {f"tokenizer.ggml.{name}": value for name, value in tokens.items()})
    with pytest.raises(ModelError, match=r"more tokens than the 64 rows of token_embd\.weight"):
        open_source(path)


def test_ids_of_minus_one_are_none(tiny_gguf: Make) -> None:
    """Where llama.cpp warns and goes on, too: as some converters write them."""
    ids = dict.fromkeys((f"tokenizer.ggml.{name}_token_id" for name in IDS), 2**32 - 1)
    path = tiny_gguf(fields=WORDS | ids)
    files = open_source(path).tokenizer
    assert files is not None
    assert (files.bos_id, files.eos_id, files.eos_ids, files.add_bos) == (None, None, (), False)
    data = path.read_bytes()
    for name in IDS:
        key = f"tokenizer.ggml.{name}_token_id".encode()
        data = data.replace(key + b"\4\0\0\0", key + b"\5\0\0\0")  # the same as int32
    path.write_bytes(data)
    assert open_source(path).tokenizer == files


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", *ROUNDED])
def test_numbers_that_are_not_finite(tiny_gguf: Make, kind: str, scale: float) -> None:
    """Of blocks: a scale. The last of the tensor, and whatever it is packed as."""
    path = tiny_gguf(kind=kind)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    names = {"embed": "token_embd.weight", "layers.0.down": "blk.0.ffn_down.weight"}
    size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    at = block_bytes - 4 if size == 1 else {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    raw = np.float32(scale).tobytes() if kind == "F32" else np.float16(scale).tobytes()
    if kind == "BF16":
        raw = np.float32(scale).tobytes()[2:]
    if size == 1:
        at = 0
    with path.open("r+b") as file:
        for name in names.values():
            file.seek(tensors[name].data_offset + int(tensors[name].n_bytes) - block_bytes + at)
            file.write(raw)
    source = open_source(path)
    for ours, theirs in names.items():
        tensor = source.tensor(ours)
        message = rf"tiny\.gguf: tensor {theirs} holds NaN or infinity"
        with pytest.raises(ModelError, match=message):
            tensor.float32()
        kinds = {Kind.F32, Kind.F16, Kind.BF16, Kind.Q8, tensor.kind}
        for packed_kind in kinds - {Kind.Q4C}:
            with pytest.raises(ModelError, match=message):
                tensor.packed(packed_kind)
        if tensor.kind == Kind.Q4C:
            with pytest.raises(ModelError, match=message):
                tensor.column_scales()


POWERINFER_SHAPES = {
    "blk.0.ffn_down_t.weight": (512, 256),
    "blk.0.fc1.weight": (256, 256),
    "blk.0.fc2.weight": (512, 256),
}
POWERINFER: dict[str, Any] = {"shapes": POWERINFER_SHAPES, "without": ["blk.0.ffn_down.weight"]}
POWERINFER_NAMES = {
    **NAMES,
    "layers.0.down": "blk.0.ffn_down_t",
    "layers.0.fc1": "blk.0.fc1",
    "layers.0.fc2": "blk.0.fc2",
}


def marked(path: Path) -> Path:
    """The file with the first four bytes of PowerInfer's files, which the gguf package does not read."""
    with path.open("r+b") as file:
        file.write(b"PWRI")
    return path


@pytest.mark.parametrize("mark", [marked, Path])
@pytest.mark.parametrize("kind", [*EXACT, "Q4_K", *ROUNDED])
def test_powerinfer_files(tiny_gguf: Make, kind: str, mark: Callable[[Path], Path]) -> None:
    """Rows of ffn_down_t are neurons as they lie, so every matrix keeps its blocks."""
    path = tiny_gguf(kind=kind, **POWERINFER)
    published = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    source = open_source(mark(path))
    assert source.spec.architecture.feed_forward.activation == "relu"
    assert source.spec.predictor == Predictor(input="residual", activation="relu", threshold=0.0)
    assert source.names() == POWERINFER_NAMES.keys()
    for name, theirs in POWERINFER_NAMES.items():
        tensor, values = source.tensor(name), published[f"{theirs}.weight"].copy()
        assert tensor.shape == values.shape
        np.testing.assert_array_equal(tensor.float32(), values, err_msg=name)
        if values.ndim == 2:
            assert tensor.kind == EXACT.get(kind, ROUNDED.get(kind, Kind.Q4)), name
            packed = unpack(tensor.packed(tensor.kind), tensor.kind, 256)
            if kind in EXACT:
                np.testing.assert_array_equal(packed, values, err_msg=name)
            elif kind == "Q4_K":
                assert np.abs(packed - values).max() <= np.abs(values).max() * 2**-10
            else:
                assert (np.abs(packed - values) <= bound(values, tensor.kind)).all(), name
    assert not any("turned" in note for note in source.notes)


def test_powerinfer_threshold(tiny_gguf: Make) -> None:
    path = tiny_gguf(**POWERINFER, fields={"powerinfer.sparse_threshold": -0.375})
    assert open_source(path).spec.predictor == Predictor(threshold=-0.375)


def test_powerinfer_file_without_predictors(tiny_gguf: Make) -> None:
    without = [*POWERINFER["without"], "blk.0.fc1.weight", "blk.0.fc2.weight"]
    source = open_source(marked(tiny_gguf(shapes=POWERINFER_SHAPES, without=without)))
    assert (source.spec.architecture.feed_forward.activation, source.spec.predictor) == ("relu", None)
    assert source.names() == NAMES.keys()


def test_ranks_are_those_of_each_layer(tiny_gguf: Make) -> None:
    shapes = {name.replace("blk.0", "blk.1"): shape for name, shape in (GGUF_SHAPES | POWERINFER_SHAPES).items()}
    shapes |= POWERINFER_SHAPES | {"blk.0.fc1.weight": (40, 256), "blk.0.fc2.weight": (512, 40)}
    without = ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    two = {"llama.block_count": 2}
    path = tiny_gguf(kind="F16", shapes=shapes, without=without, fields=two)
    source = open_source(path)
    assert [source.tensor(f"layers.{i}.{part}").shape for i in (0, 1) for part in ("fc1", "fc2")] == [
        (40, 256),
        (512, 40),
        (256, 256),
        (512, 256),
    ]
    fc2 = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.fc2.weight")
    packed = source.tensor("layers.0.fc2").packed(Kind.F16).view(np.float16)
    np.testing.assert_array_equal(packed, np.pad(fc2, ((0, 0), (0, 24))))
    for missing in ("blk.1.fc1", "blk.0.fc2"):
        some = tiny_gguf(shapes=shapes, without=[*without, f"{missing}.weight"], fields=two)
        with pytest.raises(ModelError, match=rf"tensor {missing.replace('blk', 'layers')} is missing; .* incomplete$"):
            open_source(some)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "bamboo"}, "architecture 'bamboo' is not supported; llama is"),
        ({"architecture": "generic.gpu_index"}, "architecture 'generic.gpu_index' is not supported; llama is"),
        ({"fields": {"powerinfer.sparse_threshold": float("nan")}}, "predictor threshold nan is not a number"),
        ({"fields": {"powerinfer.sparse_threshold": "low"}}, "field powerinfer.sparse_threshold is 'low'"),
        ({"without": []}, "blk.0.ffn_down.weight does not belong to a PowerInfer llama model"),
        ({"without": ["blk.0.ffn_down.weight", "blk.0.ffn_down_t.weight"]}, "layers.0.down is missing"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.ffn_down_t.weight": (256, 512)}}, r"shape \(256, 512\) instead of \(5"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.fc1.weight": (256, 512)}}, r"fc1.weight has shape \(256, 512\)"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.fc1.weight": (512,)}}, r"fc1.weight has shape \(512,\)"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.fc2.weight": (512, 512)}}, r"fc2.weight has shape \(512, 512\)"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.fc1.bias": (256,)}}, "layers.0.fc1.bias is unexpected"),
        ({"shapes": POWERINFER_SHAPES | {"blk.1.fc1.weight": (256, 256)}}, "layers.1.fc1 is unexpected"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.gpu_idx": (512,)}}, "blk.0.gpu_idx does not belong to a PowerInfer"),
    ],
)
def test_powerinfer_files_that_are_refused(tiny_gguf: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_source(marked(tiny_gguf(**POWERINFER | options)))
    assert "\n" not in str(caught.value)


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf is a pipe or a device; a model's files must be regular files$"):
        open_source(tmp_path / "model.gguf")


def test_damaged_files_are_refused(tiny_gguf: Make, tmp_path: Path) -> None:
    content = tiny_gguf(kind="Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in np.linspace(0, len(content) - 100, 60).astype(int):
        cut.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            open_source(cut)
    cut.write_bytes(b"PK" + content[2:])
    with pytest.raises(ModelError, match=r"cut\.gguf is not a whole GGUF file"):
        open_source(cut)


def test_neither_folder_nor_gguf(tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        open_source(other)
    with pytest.raises(ModelError, match="does not exist"):
        open_source(tmp_path / "none.gguf")
