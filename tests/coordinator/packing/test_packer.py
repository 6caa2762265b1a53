"""Packed files against their source, and the cache that holds them.  pytest tests/coordinator/packing/test_packer.py"""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.errors import ModelError, ResourceError, UsageError, WarmfrontError
from warmfront.shared.files import locked, published
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind, row_bytes, unpack
from warmfront.shared.model.spec import ModelSpec, Predictor
from warmfront.shared.model.store import PackedModel

Make = Callable[..., Path]
# 80 neurons: two groups and a half.
SIZES = {"intermediate_size": 80, "attention_bias": True}
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8": Kind.Q8, "q4": Kind.Q4S}


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed models in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "warmfront" / "models"


@pytest.fixture
def folder(tiny_llama: Make) -> Path:
    return tiny_llama(**SIZES)


def pack(path: Path, dtype: str = "auto") -> Path:
    return ensure_packed(path, dtype, lambda line: None, lambda done, total: None)


def tensors_of(packed: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Everything in the file but its sums, read by the safetensors library, which checks that the tensors fill it."""
    with safe_open(packed, "np") as file:
        return {name: file.get_tensor(name) for name in set(file.keys()) - {"sums"}}, file.metadata()


@pytest.mark.parametrize("published", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["auto", *KINDS])
def test_every_tensor_is_that_of_the_source(tiny_llama: Make, dtype: str, published: str) -> None:
    path = tiny_llama(**SIZES, dtype=published)
    source = open_source(path)
    kind = KINDS.get(dtype, Kind.F32 if published == "float32" else Kind.BF16)
    tensors, metadata = tensors_of(pack(path, dtype))
    assert metadata["format"] == "warmfront-6"
    assert ModelSpec.from_json(metadata["spec"]) == source.spec
    matrices = {"embed", "head", *(f"layers.{i}.{part}" for i in range(2) for part in "qkvo")}
    assert json.loads(metadata["kinds"]) == dict.fromkeys([*matrices, "gate", "down"], int(kind))
    vectors = {name for name in source.names() if name.endswith(("norm", "bias"))}
    assert len(vectors) == 1 + 2 * (2 + 4)
    assert set(tensors) == matrices | vectors | {"tokenizer", "layers.0.ffn", "layers.1.ffn"}
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
    kind = {"auto": Kind.F32, "q4": Kind.Q8}.get(dtype, KINDS.get(dtype, Kind.F32))
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


def test_text_comes_along(folder: Path) -> None:
    with PackedModel(pack(folder)) as model:
        tokenizer = Tokenizer.from_str(model.bytes_of("tokenizer").tobytes().decode())
        assert tokenizer.get_vocab() == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        ids = {name: tokenizer.token_to_id(settings[name]) for name in ("bos_token", "eos_token")}
        assert model.text["chat_template"] == settings["chat_template"]
        assert (model.text["bos_id"], model.text["eos_id"]) == (ids["bos_token"], ids["eos_token"])
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
    floats = 4 * (64 + 2 * (2 * 64 + 64 + 32 + 32 + 64))
    tokenizer = len((folder / "tokenizer.json").read_bytes())
    # Of eight rows of each matrix, the three groups of each layer, each vector, the tokenizer; and two checksums.
    sums = 8 * (2 * -(-vocab // 8) + 2 * (8 + 4 + 4 + 8) + 2 * 3 + 1 + 2 * 6 + 1 + 2)
    assert (8 + header) % 8 == 0
    assert packed.stat().st_size == 8 + header + matrices + bundles + floats + tokenizer + sums


def test_progress_grows_to_the_size_of_the_file(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    packed = ensure_packed(folder, "auto", lambda line: None, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert {total for _, total in seen} == {packed.stat().st_size}
    assert seen[-1][0] == seen[-1][1]


def test_a_second_call_uses_the_first_ones_file(folder: Path, models: Path) -> None:
    first = pack(folder)
    before = first.stat()

    def fail(*_args: object) -> None:
        raise AssertionError("packed again")

    assert ensure_packed(folder, "auto", fail, fail) == first
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(models.iterdir()) == [first]


def test_types_lie_beside_each_other(folder: Path, models: Path) -> None:
    assert {pack(folder, dtype) for dtype in ("auto", "f16", "q4")} == set(models.iterdir())
    assert len(list(models.iterdir())) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_content_is_packed_anew(folder: Path, tmp_path: Path, file: str) -> None:
    """Small files even at the same time and size; of weights, samples and the time are looked at."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = pack(copy)
    changed = copy / file
    times = changed.stat()
    data = changed.read_bytes()
    if file == "model.safetensors":
        changed.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        changed.write_bytes(data.replace(b": ", b" :", 1))
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed.stat().st_size == times.st_size
    assert json.loads((copy / "config.json").read_bytes())
    second = pack(copy)
    assert second != first
    if file == "model.safetensors":
        assert second.read_bytes() != first.read_bytes()


@pytest.mark.parametrize("change", ["touch", "README.md", "picture.png"])
def test_what_is_no_content_is_not_packed_anew(folder: Path, tmp_path: Path, models: Path, change: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = pack(copy)
    before = first.stat()
    if change == "touch":
        for file in copy.iterdir():
            os.utime(file)
    else:
        (copy / change).write_text("changed")
    assert pack(copy) == first
    assert first.stat().st_ino == before.st_ino
    assert list(models.iterdir()) == [first]


def test_a_model_that_changes_while_it_is_packed(folder: Path, tmp_path: Path, models: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")

    def change(done: int, total: int) -> None:
        if done == total:
            os.utime(copy / "model.safetensors")

    with pytest.raises(ModelError, match=r"copy was changed while it was packed: start again$"):
        ensure_packed(copy, "auto", lambda line: None, change)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("name", ["two\nlines", "ünï" * 25, "..", "-x", "a b.c"])
def test_names_that_are_no_file_names(tiny_gguf: Make, tmp_path: Path, name: str) -> None:
    packed = pack(tiny_gguf().rename(tmp_path / f"{name}.gguf"))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-auto-[0-9a-f]{20}\.safetensors", packed.name)
    assert len(packed.name) < 120


def test_the_cache_is_private(folder: Path, models: Path) -> None:
    before = os.umask(0)
    try:
        pack(folder)
    finally:
        os.umask(before)
    folders = [models.parent, *(path for path in models.parent.iterdir() if path.is_dir())]
    assert len(folders) > 2
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_when_it_was_last_used(folder: Path) -> None:
    packed = pack(folder)
    os.utime(packed, (1, 2))
    pack(folder)
    assert packed.stat().st_atime > 1e9
    assert packed.stat().st_mtime == 2


def test_a_moved_model_is_recognised(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert pack(copy) == pack(folder)


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("half way")])
def test_a_failure_leaves_nothing(
    folder: Path, models: Path, error: BaseException, nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on file systems that know no files without a name; and packing works afterwards."""
    if not nameless:
        refuse_nameless_files(monkeypatch)

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    before = os.listdir("/proc/self/fd")
    with pytest.raises(type(error)):
        ensure_packed(folder, "auto", lambda line: None, fail)
    assert list(models.iterdir()) == []
    assert os.listdir("/proc/self/fd") == before
    assert set(tensors_of(pack(folder))[0]) > {"embed", "norm"}
    assert len(list(models.iterdir())) == 1


def refuse_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    """Whole, or not at all; a leftover of a run that was killed does not matter."""
    if not nameless:
        refuse_nameless_files(monkeypatch)
    target = tmp_path / "model.safetensors"
    for text in (b"first", b"second"):
        with target.open("rb") if target.exists() else contextlib.nullcontext() as old:
            if old is not None:
                target.with_suffix(".partial").write_bytes(b"left over")
            with published(target) as fd:
                os.write(fd, text)
            assert target.read_bytes() == text
            assert old is None or old.read() == b"first"
    with pytest.raises(ZeroDivisionError), published(target) as fd:
        os.write(fd, bytes(1 // 0))
    assert target.read_bytes() == b"second"
    assert list(tmp_path.glob("model*")) == [target]


def test_a_kill_while_writing_leaves_nothing(folder: Path, models: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from warmfront.coordinator.packing.packer import ensure_packed\n"
        "kill = lambda done, total: done > total // 2 and os.kill(os.getpid(), 9)\n"
        "ensure_packed(Path(sys.argv[1]), 'auto', print, kill)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)])
    assert run.returncode == -signal.SIGKILL
    assert list(models.iterdir()) == []
    pack(folder)


def test_no_room(folder: Path, models: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ResourceError) as caught:
            pack(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    what_to_do = "set XDG_CACHE_HOME to a folder with room"
    assert str(caught.value) == f"cannot write the packed model to {models}: File too large; {what_to_do}"
    assert list(models.iterdir()) == []


def test_room_is_seen_to_before_packing(folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstatvfs

    def nearly_full(fd: int) -> Any:
        return type("Disk", (), {"f_bavail": 100, "f_frsize": real(fd).f_frsize})

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    with pytest.raises(ResourceError) as caught:
        pack(folder)
    assert re.search(r"needs 0\.00 GB in \S+, 0\.00 GB are free there: make room \(`warmfront", str(caught.value))
    assert list(models.iterdir()) == []


def test_a_disk_that_fills_up_half_way(folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if offset > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"cannot write the packed model to .*: No space left on device"):
        pack(folder)
    assert list(models.iterdir()) == []


def test_another_model_is_not_waited_for(folder: Path, tiny_gguf: Make) -> None:
    first = pack(folder)
    with locked(first):
        other = ensure_packed(tiny_gguf(), "auto", pytest.fail, lambda done, total: None)
        types = ensure_packed(folder, "q8", pytest.fail, lambda done, total: None)
        assert ensure_packed(folder, "auto", pytest.fail, lambda done, total: None) == first, "nothing is written"
    assert len({first, other, types}) == 3


def test_a_second_run_waits_for_the_first(folder: Path, models: Path) -> None:
    said: list[str] = []
    waiting = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    target = pack(folder)
    target.unlink()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        first.enter_context(locked(target))
        packing = threading.Thread(target=ensure_packed, args=(folder, "auto", say, lambda done, total: None))
        packing.start()
        stack.callback(packing.join)
        assert waiting.wait(10)
        packing.join(0.05)
        assert packing.is_alive()
        assert list(models.iterdir()) == []
        first.close()
    assert said == ["waiting for another warmfront that is packing a model"]
    assert len(list(models.iterdir())) == 1


def test_feed_forward_biases_are_refused(tiny_llama: Make, models: Path) -> None:
    with pytest.raises(ModelError, match=r"^tiny_llama\d+ uses feed-forward biases, which are not supported yet$"):
        pack(tiny_llama(mlp_bias=True))
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("name", ["model.gguf", "copy/model.safetensors", "copy/README.md"])
def test_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path, models: Path, name: str) -> None:
    """Nobody ever writes into it."""
    shutil.copytree(folder, tmp_path / "copy")
    pipe = tmp_path / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(ModelError, match=f"^{re.escape(str(pipe))} is a pipe or a device; "):
        pack(pipe if pipe.suffix == ".gguf" else pipe.parent)
    assert not models.exists()


def test_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"model\.gguf is a pipe or a device; "):
        pack(tmp_path / "model.gguf")


def test_a_dangling_link_beside_the_model_is_ignored(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").symlink_to(tmp_path / "nothing")
    assert pack(copy).exists()


@pytest.mark.parametrize("path", ["missing.gguf", "missing"])
def test_no_such_model(tmp_path: Path, path: str) -> None:
    with pytest.raises((ModelError, UsageError)) as caught:
        pack(tmp_path / path)
    assert isinstance(caught.value, WarmfrontError)
    assert str(tmp_path / path) in str(caught.value)
