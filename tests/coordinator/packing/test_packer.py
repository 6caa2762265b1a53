"""Packed files against their source.  pytest tests/coordinator/packing/test_packer.py"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from tests.coordinator.packing.packed import KINDS, SIZES, pack, tensors_of
from tests.shared.model.specs import changed
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.models.packed_tokenizer import pack_tokenizer
from warmfront.coordinator.packing.packed_file import write_packed
from warmfront.coordinator.packing.packer import PackingPlan
from warmfront.shared.errors import DamagedError, ModelError
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import FLOATS, Kind, row_bytes, unpack
from warmfront.shared.model.spec import ModelSpec, Predictor
from warmfront.shared.model.store import FORMAT, PackedModel

Make = Callable[..., Path]


@pytest.mark.parametrize("published", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["auto", *KINDS])
def test_every_tensor_is_that_of_the_source(tiny_llama: Make, dtype: str, published: str) -> None:
    path = tiny_llama(**SIZES, dtype=published)
    source = open_source(path)
    kind = KINDS.get(dtype, Kind.F32 if published == "float32" else Kind.BF16)
    tensors, metadata = tensors_of(pack(path, dtype))
    assert metadata["format"] == FORMAT
    assert ModelSpec.from_json(metadata["spec"]) == source.spec
    matrices = {"embed", "head", *(f"layers.{i}.{part}" for i in range(2) for part in "qkvo")}
    assert json.loads(metadata["kinds"]) == dict.fromkeys([*matrices, "gate", "down"], int(kind))
    vectors = {name for name in source.names() if name.endswith(("norm", "bias"))}
    assert len(vectors) == 1 + 2 * (2 + 4)
    assert set(tensors) == matrices | vectors | {"tokenizer", "largest", "layers.0.ffn", "layers.1.ffn"}
    for name in matrices:
        np.testing.assert_array_equal(tensors[name], source.tensor(name).packed(kind))
    for name in vectors:
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], source.tensor(name).float32())
    # And the values, by another way than packed bytes.
    q, exact = tensors["layers.1.q"], source.tensor("layers.1.q").float32()
    tolerance = {Kind.F32: 0.0, Kind.F16: 1e-3, Kind.BF16: 4e-3, Kind.Q8: 4e-3, Kind.Q4S: 0.1}[kind]
    np.testing.assert_allclose(unpack(q, kind, 64), exact, atol=tolerance)


@pytest.mark.parametrize("dtype", ["auto", *KINDS])
def test_largest_bounds_every_weight_of_a_layer(folder: Path, dtype: str) -> None:
    """Of gate, up and down, layer by layer; what is not quantised has exactly that."""
    source, kind = open_source(folder), KINDS.get(dtype, Kind.F32)
    with PackedModel(pack(folder, dtype)) as model:
        found, reach = model.floats("largest").reshape(2, 3), model.reach
    exact = np.zeros((2, 3), np.float32)
    for layer in range(2):
        for i, part in enumerate(("gate", "up", "down")):
            rows = source.tensor(f"layers.{layer}.{part}").packed(kind)
            exact[layer, i] = np.abs(unpack(rows, kind, 64)).max()
    assert (exact <= found).all()
    assert (found <= (1 if kind in FLOATS else 2.3) * exact).all()
    np.testing.assert_allclose(reach, 80 * found.astype(np.float64).prod(1), rtol=1e-15)


@pytest.mark.parametrize("dtype", ["auto", *KINDS])
def test_bundles_are_gate_up_and_down_rows(folder: Path, dtype: str) -> None:
    source, kind = open_source(folder), KINDS.get(dtype, Kind.F32)
    row = row_bytes(kind, 64)
    bundle = -(-3 * row // 64) * 64
    tensors, _ = tensors_of(pack(folder, dtype))
    for layer in range(2):
        groups = tensors[f"layers.{layer}.ffn"]
        assert groups.shape == (3, 32 * bundle)
        neurons = groups.reshape(96, bundle)
        for at, part in enumerate(("gate", "up", "down")):
            rows = source.tensor(f"layers.{layer}.{part}").packed(kind)
            np.testing.assert_array_equal(neurons[:80, at * row : (at + 1) * row], rows)
        assert not neurons[:80, 3 * row :].any(), "padding of a bundle"
        assert not neurons[80:].any(), "padding of the last group"


def test_gate_and_down_may_differ_in_type(tiny_gguf: Make) -> None:
    """Of Q5_0 all become Q8; with dtype f16, all are F16."""
    for dtype, kind in (("auto", Kind.Q8), ("f16", Kind.F16), ("q4", Kind.Q4S)):
        with PackedModel(pack(tiny_gguf(kind="Q5_0"), dtype)) as model:
            assert model.layout == BundleLayout(hidden=256, ffn=512, gate_kind=kind, down_kind=kind)


@pytest.mark.parametrize("dtype", ["auto", "q4"])
@pytest.mark.parametrize(("published", "gate"), [("Q4_0", Kind.Q4S), ("Q4_1", Kind.Q4)])
def test_down_of_four_bits_is_kept_exactly(tiny_gguf: Make, published: str, gate: Kind, dtype: str) -> None:
    """Its blocks run across neurons: the numbers in the bundles, scale and minimum of each column in the tail."""
    packed = pack(tiny_gguf(kind=published), dtype)
    with PackedModel(packed) as model:
        layout = model.layout
        assert layout == BundleLayout(hidden=256, ffn=512, gate_kind=gate, down_kind=Kind.Q4C)
        groups = model.bytes_of("layers.0.ffn").reshape(16, -1)
    source = open_source(packed.parents[3] / "tiny.gguf")
    bundles = groups[:, : 32 * 448].reshape(512, 448)
    gates = bundles[:, : layout.gate_row_bytes]
    np.testing.assert_array_equal(unpack(gates, gate, 256), source.tensor("layers.0.gate").float32())
    nibbles = bundles[:, layout.down_offset : layout.down_offset + 128].reshape(512, 8, 16)
    numbers = np.concatenate((nibbles & 15, nibbles >> 4), axis=2).reshape(16, 32, 256).astype(np.float32)
    tails = groups[:, 32 * 448 :].copy().view(np.float16).astype(np.float32).reshape(16, 2, 1, 256)
    down = (numbers * tails[:, 0] + tails[:, 1]).reshape(512, 256)
    np.testing.assert_array_equal(down, source.tensor("layers.0.down").float32())
    with PackedModel(packed) as model:
        bound = model.floats("largest")[2]
    assert np.abs(down).max() <= bound <= 2.3 * np.abs(down).max()


@pytest.mark.parametrize("dtype", ["auto", "q4"])
def test_types_of_four_bits_beside_each_other(tiny_gguf: Make, dtype: str) -> None:
    """Q4_0 gates and Q4_1 ups share the type that holds both exactly; other matrices have types of their own."""
    kinds = {"blk.0.ffn_up.weight": "Q4_1", "blk.0.attn_k.weight": "Q4_1", "token_embd.weight": "Q8_0"}
    path = tiny_gguf(kind="Q4_0", kinds=kinds)
    source = open_source(path)
    with PackedModel(pack(path, dtype)) as model:
        layout = model.layout
        assert (layout.gate_kind, layout.down_kind) == (Kind.Q4, Kind.Q4C)
        found = {name: model.entries[name].kind for name in ("embed", "layers.0.q", "layers.0.k")}
        embed = Kind.Q8 if dtype == "auto" else Kind.Q4S
        assert found == {"embed": embed, "layers.0.q": Kind.Q4S, "layers.0.k": Kind.Q4}
        bundles = model.bytes_of("layers.0.ffn").reshape(16, -1)[:, : layout.tail_offset].reshape(512, -1)
    for part, start in (("gate", 0), ("up", layout.up_offset)):
        rows = unpack(bundles[:, start : start + layout.gate_row_bytes], Kind.Q4, 256)
        np.testing.assert_array_equal(rows, source.tensor(f"layers.0.{part}").float32())


@pytest.mark.parametrize("other", ["Q8_0", "F16"])
def test_four_bits_beside_wider_types(tiny_gguf: Make, other: str) -> None:
    """With dtype q4 the wider ones are rounded, to what the bundles' 4-bit rows have or else to Q4S."""
    for kind, gate in (("Q4_0", Kind.Q4S), ("Q4_1", Kind.Q4)):
        kinds = {"blk.0.ffn_up.weight": other, "blk.0.ffn_down.weight": other}
        path = tiny_gguf(kind=kind, kinds=kinds)
        source = open_source(path)
        with PackedModel(pack(path, "q4")) as model:
            layout = model.layout
            assert (layout.gate_kind, layout.down_kind) == (gate, Kind.Q4S)
            bundles = model.bytes_of("layers.0.ffn").reshape(512, -1)
        parts = (
            ("gate", 0, gate, 0),
            ("up", layout.up_offset, gate, 0.15),
            ("down", layout.down_offset, Kind.Q4S, 0.15),
        )
        for part, start, of, tolerance in parts:
            rows = unpack(bundles[:, start : start + row_bytes(of, 256)], of, 256)
            np.testing.assert_allclose(rows, source.tensor(f"layers.0.{part}").float32(), rtol=0, atol=tolerance)


RANKS = (40, 7)


def predictors() -> dict[str, np.ndarray]:
    """fc1 [r, 64] and fc2 [80, r] of two layers, r of neither a multiple of 32."""
    rng = np.random.default_rng(7)
    return {
        f"layers.{i}.{part}": rng.normal(0, 0.3, shape).astype(np.float32)
        for i, rank in enumerate(RANKS)
        for part, shape in (("fc1", (rank, 64)), ("fc2", (80, rank)))
    }


@pytest.fixture
def predicting(folder: Path, tmp_path: Path) -> Path:
    """The folder with those predictors."""
    copy = shutil.copytree(folder, tmp_path / "predicting")
    metadata = {"input": "normed", "threshold": "0.25"}
    save_file({f"{name}.weight": v for name, v in predictors().items()}, copy / "predictor.safetensors", metadata)
    return copy


@pytest.mark.parametrize("dtype", ["auto", *KINDS])
def test_predictors_are_padded_with_zeros(predicting: Path, dtype: str) -> None:
    """To whole blocks of ranks and whole groups of neurons; in 4 bits they would lose neurons, so they get 8."""
    kind = {"auto": Kind.F32, "q4": Kind.Q8, "q4f": Kind.Q8}.get(dtype, KINDS.get(dtype, Kind.F32))
    tensors, metadata = tensors_of(pack(predicting, dtype))
    assert ModelSpec.from_json(metadata["spec"]).predictor == Predictor("normed", "relu", 0.25)
    for i, rank in enumerate((64, 32)):
        for part, shape in (("fc1", (rank, 64)), ("fc2", (96, rank))):
            name = f"layers.{i}.{part}"
            assert json.loads(metadata["kinds"])[name] == kind
            values = predictors()[name]
            whole = np.zeros(shape, np.float32)
            whole[: values.shape[0], : values.shape[1]] = values
            assert (tensors[name].dtype, tensors[name].shape) == (np.uint8, (shape[0], row_bytes(kind, shape[1])))
            assert not tensors[name][len(values) :].any(), "rows of the padding"
            exact = {"f32": whole.view(np.uint8), "f16": whole.astype(np.float16).view(np.uint8)}
            if kind.name.lower() in exact:
                np.testing.assert_array_equal(tensors[name], exact[kind.name.lower()])
            found = unpack(tensors[name], kind, shape[1])
            assert not found[:, values.shape[1] :].any(), "columns of the padding"
            np.testing.assert_allclose(found, whole, atol=0.01)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "layers.1.fc1",
            0,
            r"^predicting: the predictor's layers\.1\.fc1 holds only zeros, it would choose no neuron; ",
        ),
        ("layers.0.fc2", np.nan, r"tensor layers\.0\.fc2\.weight holds NaN or infinity"),
    ],
)
def test_predictors_that_can_choose_nothing(predicting: Path, name: str, value: float, message: str) -> None:
    tensors = {f"{name}.weight": values for name, values in predictors().items()}
    tensors[f"{name}.weight"][:] = value
    save_file(tensors, predicting / "predictor.safetensors")
    with pytest.raises(ModelError, match=message):
        pack(predicting)


def test_bundles_are_the_same_with_predictors(folder: Path, predicting: Path) -> None:
    plain, _ = tensors_of(pack(folder))
    with_them, _ = tensors_of(pack(predicting))
    assert with_them.keys() - plain.keys() == predictors().keys()
    for name, values in plain.items():
        np.testing.assert_array_equal(with_them[name], values)


def test_predictions_of_the_packed_matrices(predicting: Path) -> None:
    """Who fires is what the published matrices say, at any input."""
    x = np.random.default_rng(1).normal(size=(50, 64)).astype(np.float32)
    with PackedModel(pack(predicting)) as model:
        assert model.spec.predictor is not None
        threshold = model.spec.predictor.threshold
        for i, rank in enumerate((64, 32)):
            fc1, fc2 = (model.bytes_of(f"layers.{i}.{part}").view(np.float32) for part in ("fc1", "fc2"))
            logits = np.maximum(x @ fc1.reshape(rank, 64).T, 0) @ fc2.reshape(96, rank).T
            published = predictors()
            theirs = np.maximum(x @ published[f"layers.{i}.fc1"].T, 0) @ published[f"layers.{i}.fc2"].T
            certain = np.abs(theirs - threshold) > 1e-4
            assert 0.1 < (theirs > threshold).mean() < 0.9
            np.testing.assert_array_equal((logits[:, :80] > threshold)[certain], (theirs > threshold)[certain])
            assert not logits[:, 80:].any()


@pytest.mark.parametrize(("published", "kind"), [("F16", Kind.F16), ("Q8_0", Kind.Q8), ("Q4_0", Kind.Q4S)])
def test_powerinfer_file(tiny_gguf: Make, published: str, kind: Kind) -> None:
    """Its blocks are kept by `auto`, down rows' too; dtype q4 widens predictors to 8 bits."""
    shapes = {"blk.0.ffn_down_t.weight": (512, 256), "blk.0.fc1.weight": (96, 256), "blk.0.fc2.weight": (512, 96)}
    path = tiny_gguf(kind=published, shapes=shapes, without=["blk.0.ffn_down.weight"])
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    with PackedModel(pack(path)) as model:
        assert model.spec.architecture.feed_forward.activation == "relu"
        layout = model.layout
        assert layout == BundleLayout(hidden=256, ffn=512, gate_kind=kind, down_kind=kind)
        for part, cols in (("fc1", 256), ("fc2", 96)):
            entry = model.entries[f"layers.0.{part}"]
            assert entry.kind == kind
            found = unpack(model.bytes_of(f"layers.0.{part}").reshape(entry.shape), kind, cols)
            np.testing.assert_array_equal(found, theirs[f"blk.0.{part}.weight"])
        bundles = model.bytes_of("layers.0.ffn").reshape(512, layout.bundle_bytes)
        rows = bundles[:, layout.down_offset : layout.down_offset + layout.down_row_bytes]
        np.testing.assert_array_equal(unpack(rows, kind, 256), theirs["blk.0.ffn_down_t.weight"])
    with PackedModel(pack(path, "q4")) as model:
        assert {model.entries[f"layers.0.{part}"].kind for part in ("fc1", "fc2")} == {Kind.Q8}
        assert (model.layout.gate_kind, model.layout.down_kind) == (Kind.Q4S, Kind.Q4S)


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("vocab", 301, "embed"),
        ("ffn", 97, "layers.0.fc2"),
        ("architecture.attention.heads", 6, "layers.0.q"),
        ("architecture.attention.kv_heads", 4, "layers.0.k"),
        ("hidden", 96, "embed"),
    ],
)
def test_a_description_of_other_sizes_is_refused(
    predicting: Path, tmp_path: Path, field: str, value: int, tensor: str
) -> None:
    """Compiled code would read beyond the tensors."""
    plan = PackingPlan(open_source(predicting), "q8")
    with (tmp_path / "other").open("wb") as file:
        spec, tensors = changed(plan.source.spec, field, value), map(plan.data, plan.shapes)
        write_packed(file.fileno(), spec, plan.all_kinds(), plan.text(), plan.shapes, tensors)
    with pytest.raises(DamagedError, match=rf"is damaged \(tensor {tensor} has shape .*, not shape \(\d+, \d+\)\);"):
        PackedModel(tmp_path / "other")


def test_text_comes_along(folder: Path) -> None:
    with PackedModel(pack(folder)) as model:
        assert model.bytes_of("tokenizer").tobytes() == pack_tokenizer((folder / "tokenizer.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        ids = {name: tokenizer.token_to_id(settings[name]) for name in ("bos_token", "eos_token")}
        assert model.text["chat_templates"] == {"default": settings["chat_template"]}
        assert model.text["bos_id"] == ids["bos_token"]
        assert model.text["special_tokens"] == {name: settings[name] for name in ids}
        assert ids["eos_token"] in model.text["eos_ids"]
        assert model.text["add_bos"] is False


def test_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with PackedModel(pack(copy)) as model:
        assert "tokenizer" not in model.entries
        assert model.text == {}


def test_a_tied_head_is_not_stored_twice(tiny_llama: Make) -> None:
    assert "head" not in tensors_of(pack(tiny_llama(tie_word_embeddings=True)))[0]


@pytest.mark.parametrize("dtype", ["f32", "q8", "q4"])
def test_file_size(folder: Path, dtype: str) -> None:
    """The header, then every tensor once, then a sum of each piece, nothing between."""
    packed, kind = pack(folder, dtype), KINDS[dtype]
    with packed.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    vocab = open_source(folder).spec.vocab
    rows = row_bytes(kind, 64)
    matrices = (2 * vocab + 2 * (64 + 32 + 32 + 64)) * rows
    bundles = 2 * 96 * (-(-3 * rows // 64) * 64)
    floats = 4 * (64 + 2 * (2 * 64 + 64 + 32 + 32 + 64) + 2 * 3)
    tokenizer = len(pack_tokenizer((folder / "tokenizer.json").read_text()))
    # Of eight rows of each matrix, the three groups of each layer, each vector, the largest magnitudes, the tokenizer;
    # and two checksums.
    sums = 8 * (2 * -(-vocab // 8) + 2 * (8 + 4 + 4 + 8) + 2 * 3 + 1 + 2 * 6 + 1 + 1 + 2)
    assert (8 + header) % 8 == 0
    assert packed.stat().st_size == 8 + header + matrices + bundles + floats + tokenizer + sums


@pytest.mark.parametrize(
    ("family", "names"), [("llama biases", {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}), ("opt", {"up": "fc1"})]
)
def test_biases_of_neurons_lie_in_their_bundles(tiny_family: Make, family: str, names: dict[str, str]) -> None:
    """And their magnitudes count as those of weights: they are as large, or larger."""
    folder = tiny_family(family)
    published = load_file(folder / "model.safetensors")
    with PackedModel(pack(folder)) as model:
        layout = model.layout
        assert layout.biases == tuple(names)
        assert not any(name.endswith((".gate.bias", ".up.bias")) for name in model.entries)
        assert model.entries["layers.1.down.bias"].shape == (64,)
        groups = model.bytes_of("layers.1.ffn").reshape(layout.groups, layout.group_bytes)
        bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
        largest = model.floats("largest").reshape(model.spec.layers, -1)[1]
        for i, (part, name) in enumerate(names.items()):
            (wanted,) = (v for n, v in published.items() if n.endswith(f"layers.1.{name}.bias"))
            at = layout.bias_offset(part)
            np.testing.assert_array_equal(bundles[:, at : at + 4].copy().view(np.float32)[:96, 0], wanted)
            (matrix,) = (v for n, v in published.items() if n.endswith(f"layers.1.{name}.weight"))
            assert largest[i] == max(np.abs(wanted).max(), np.abs(matrix).max())
