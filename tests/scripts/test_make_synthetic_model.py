"""The synthetic model: equal bytes, sparsity, the predictor, topics, and the same weights in every format."""

import importlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, MixtralForCausalLM

from warmfront.coordinator.models.gguf.reader import GgufSource
from warmfront.coordinator.models.hf.reader import HfSource

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SMALL = {"hidden": 128, "layers": 3, "ffn": 256, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 15}
LAYERS, HEADS, KV_HEADS, VOCAB, FIRST_WORD = 3, 4, 2, 512, 259
FILES = {
    "hf/config.json",
    "hf/model.safetensors",
    "hf/predictor.safetensors",
    "hf/tokenizer.json",
    "hf/tokenizer_config.json",
    "powerinfer-f16.gguf",
    "f16.gguf",
    "q8_0.gguf",
    "q4_0.gguf",
}
Make = Callable[..., Path]


class Trace(NamedTuple):
    """What greedy text did: ids and top-1 margins [text, position], gates and predictions [layer, token, neuron]."""

    ids: torch.Tensor
    margins: torch.Tensor
    open: torch.Tensor
    predicted: torch.Tensor

    def shares(self) -> torch.Tensor:
        """How often each neuron fires, [layer, neuron]."""
        return self.open.float().mean(1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads would wait for each other on busy cores; transformers' readers outlive the loading."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return importlib.import_module(SCRIPT.stem)


@pytest.fixture(scope="module")
def make(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A factory of small models; equal options give the same folder unless `fresh`."""
    made: dict[str, Path] = {}

    def factory(*, fresh: bool = False, **options: Any) -> Path:
        flags = SMALL | {name.replace("_", "-"): value for name, value in options.items()}
        key = json.dumps(flags)
        if key not in made or fresh:
            out = tmp_path_factory.mktemp("synthetic") / "model"
            assert script.main([str(out), *(f"--{name}={value}" for name, value in flags.items())]) == 0
            made[key] = out
        return made[key]

    return factory


def trace(folder: Path, starts: list[int], length: int = 128) -> Trace:
    """Greedy text from each of `starts` by transformers in float32, with the gates and the predictor's verdicts."""
    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, local_files_only=True).eval()
    predictor = {name: values.float() for name, values in load_file(folder / "hf" / "predictor.safetensors").items()}
    gates: list[torch.Tensor] = []
    predicted: list[torch.Tensor] = []

    def residual(layer: int) -> Callable[..., None]:
        fc1, fc2 = (predictor[f"layers.{layer}.{name}.weight"] for name in ("fc1", "fc2"))
        return lambda _, inputs: predicted.append(((inputs[0] @ fc1.T).relu() @ fc2.T > 0).flatten(0, 1))

    with torch.inference_mode():
        prompt = torch.tensor(starts)[:, None]
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length)
        for number, layer in enumerate(model.model.layers):
            layer.post_attention_layernorm.register_forward_pre_hook(residual(number))
            layer.mlp.gate_proj.register_forward_hook(lambda _, inputs, out: gates.append((out > 0).flatten(0, 1)))
        best = model(ids).logits.topk(2).values
    return Trace(ids, best[..., 0] - best[..., 1], torch.stack(gates), torch.stack(predicted))


@pytest.fixture(scope="module")
def greedy(make: Make) -> Trace:
    """Eight greedy texts of the small model."""
    return trace(make(), list(range(300, 500, 25)))


def weights(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a GGUF file in float32; PowerInfer's under its own magic are read as well."""
    if path.read_bytes()[:4] == b"PWRI":
        plain = path.with_suffix(".plain")
        plain.write_bytes(b"GGUF" + path.read_bytes()[4:])
        path = plain
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        found[tensor.name] = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
    return found


def expected(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The Hugging Face folder's tensors under GGUF's names, rows of q and k as neighbouring pairs."""
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for name, tensor in load_file(folder / "hf" / "model.safetensors").items():
        values = tensor.float().numpy()
        if name.removesuffix(".weight") in top:
            found[f"{top[name.removesuffix('.weight')]}.weight"] = values
            continue
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            rows, columns = values.shape
            heads = HEADS if part == "self_attn.q_proj" else KV_HEADS
            values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        found[f"blk.{layer}.{names[part]}.weight"] = values
    return found


def test_files(make: Make) -> None:
    """Everything is there, and nothing beside the folder."""
    folder = make()
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} >= FILES
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("topics", [1, 3])
def test_same_seed_same_bytes(make: Make, topics: int) -> None:
    first, second = (make(topics=topics, fresh=True) for _ in range(2))
    other = make(topics=topics, seed=1)
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        if name.endswith((".safetensors", ".gguf")):
            assert (first / name).read_bytes() != (other / name).read_bytes(), name


def test_formats_do_not_change_the_weights(make: Make) -> None:
    only = make(formats="gguf-q8_0")
    assert [path.name for path in only.iterdir()] == ["q8_0.gguf"]
    assert (only / "q8_0.gguf").read_bytes() == (make() / "q8_0.gguf").read_bytes()


def test_greedy_text(greedy: Trace) -> None:
    """Words only, a new one each time, chosen by margins far above rounding."""
    assert int(greedy.ids.min()) >= FIRST_WORD
    assert all(len(set(text)) == len(text) for text in greedy.ids.tolist())
    assert greedy.margins.min() > 1
    assert greedy.margins.median() > 5


def test_a_mixture_is_the_same_in_every_format(make: Make) -> None:
    folder = make(experts=20, used=3, topics=2)
    assert not (folder / "hf" / "predictor.safetensors").exists()
    assert not (folder / "powerinfer-f16.gguf").exists()
    ours, theirs = GgufSource(folder / "f16.gguf"), HfSource(folder / "hf")
    assert ours.spec.architecture.feed_forward == theirs.spec.architecture.feed_forward
    assert ours.names() == theirs.names()
    for name in theirs.names():
        np.testing.assert_array_equal(ours.tensor(name).float32(), theirs.tensor(name).float32(), name)


@pytest.mark.parametrize("skew", [0.1, 0.5])
def test_the_skew_of_a_mixture(make: Make, capsys: pytest.CaptureFixture[str], skew: float) -> None:
    """What a tenth of the experts gets of the choices in greedy text."""
    folder = make(experts=40, used=4, skew=skew, layers=2, fresh=True)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["firing"]
    model = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        ids = model.generate(torch.tensor([[300], [420]]), do_sample=False, max_new_tokens=100)
        scores = model(ids, output_router_logits=True).router_logits
    assert len(set(ids[0].tolist())) == ids.shape[1]
    for layer, told in zip(scores, said, strict=True):
        uses = torch.bincount(layer.topk(4).indices.flatten(), minlength=40).sort(descending=True).values
        part = float(uses[:4].sum() / uses.sum())
        assert part == pytest.approx(told, abs=0.12)
        assert skew - 0.1 < part < skew + 0.2


@pytest.mark.parametrize("active", [0.05, 0.1, 0.3])
def test_firing_share(make: Make, active: float) -> None:
    shares = trace(make(active=active), [300, 400]).shares().mean(1)
    assert (shares > 0.7 * active).all()
    assert (shares < 1.5 * active).all()


def test_firing_follows_a_power_law(greedy: Trace) -> None:
    """About a fifth of the neurons, anywhere in the layer, makes 80 % of the firing."""
    shares = greedy.shares()
    ranked = shares.sort(dim=1, descending=True).values
    part = ((ranked.cumsum(1) / ranked.sum(1, keepdim=True)) < 0.8).float().mean(1)
    assert (part > 0.17).all()
    assert (part < 0.26).all()
    hot = shares.topk(shares.shape[1] // 5, dim=1).indices
    assert all(0.3 < float((layer < shares.shape[1] // 2).float().mean()) < 0.7 for layer in hot)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_predictor_is_exact(make: Make, dtype: str) -> None:
    text = trace(make(dtype=dtype), [300, 400])
    hits = (text.open & text.predicted).sum((1, 2))
    assert (hits / text.open.sum((1, 2)) >= 0.99).all()
    assert (hits / text.predicted.sum((1, 2)) >= 0.95).all()


def test_predictor_file(make: Make) -> None:
    with safe_open(make() / "hf" / "predictor.safetensors", framework="np") as file:
        assert file.metadata() == {"input": "residual", "activation": "relu", "threshold": "0"}
        assert set(file.keys()) == {f"layers.{i}.{name}.weight" for i in range(LAYERS) for name in ("fc1", "fc2")}
        assert file.get_slice("layers.0.fc1.weight").get_shape() == [64, 128]
        assert file.get_slice("layers.0.fc2.weight").get_shape() == [256, 64]


def test_channel_0_is_constant(make: Make) -> None:
    found = expected(make())
    assert len(set(found["token_embd.weight"][:, 0].tolist())) == 1
    assert found["token_embd.weight"][0, 0] > 0
    for layer in range(LAYERS):
        assert not found[f"blk.{layer}.attn_output.weight"][0].any()
        assert not found[f"blk.{layer}.ffn_down.weight"][0].any()
        assert (found[f"blk.{layer}.ffn_norm.weight"] == 1).all()


def test_topics_have_their_own_hot_neurons(make: Make) -> None:
    """Text stays within its topic; two texts of one share more of their hottest fifth than texts of two."""
    folder = make(topics=2)
    texts = [trace(folder, [start], 100) for start in (301, 351, 300, 350)]
    assert all(len(set((text.ids % 2).flatten().tolist())) == 1 for text in texts)
    hot = [{(i, n) for i, row in enumerate(text.shares()) for n in row.topk(51).indices.tolist()} for text in texts]

    def overlap(first: int, second: int) -> float:
        return len(hot[first] & hot[second]) / len(hot[first])

    same = min(overlap(0, 1), overlap(2, 3))
    different = max(overlap(i, j) for i in (0, 1) for j in (2, 3))
    assert same > 0.8
    assert different < same - 0.15


def test_more_topics_than_dimensions(make: Make) -> None:
    text = trace(make(topics=40, formats="hf"), [FIRST_WORD + 5, FIRST_WORD + 6], 4)
    assert ((text.ids - FIRST_WORD) % 40 == torch.tensor([[5], [6]])).all()


def test_gguf_has_the_same_weights(make: Make) -> None:
    want, have = expected(make()), weights(make() / "f16.gguf")
    assert have.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(have[name], values, name)


@pytest.mark.parametrize(("name", "error"), [("q8_0", 0.01), ("q4_0", 0.15)])
def test_quantised_gguf_has_the_same_weights(make: Make, name: str, error: float) -> None:
    want, have = expected(make()), weights(make() / f"{name}.gguf")
    assert have.keys() == want.keys()
    for tensor, values in want.items():
        assert np.linalg.norm(have[tensor] - values) < error * np.linalg.norm(values), tensor


def test_powerinfer_has_the_same_weights(make: Make) -> None:
    """`ffn_down` is turned, and the predictor is in the file."""
    folder = make()
    want, have = expected(folder), weights(folder / "powerinfer-f16.gguf")
    for layer in range(LAYERS):
        want[f"blk.{layer}.ffn_down_t.weight"] = want.pop(f"blk.{layer}.ffn_down.weight").T
    for name, tensor in load_file(folder / "hf" / "predictor.safetensors").items():
        want[name.replace("layers", "blk")] = tensor.float().numpy()
    assert have.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(have[name], values, name)
    assert (folder / "powerinfer-f16.gguf").read_bytes()[:4] == b"PWRI"


def test_vocabulary_is_the_same_in_both_formats(make: Make) -> None:
    tokenizer = Tokenizer.from_file(str(make() / "hf" / "tokenizer.json"))
    words: list[str] = gguf.GGUFReader(make() / "f16.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert [word.removeprefix("▁") for word in words] == [tokenizer.id_to_token(i) for i in range(VOCAB)]
    assert tokenizer.encode("w259  w511 </s> nothing <0x0A>").ids == [259, 511, 2, 0, 13]


def test_warmfront_reads_it(make: Make) -> None:
    hf, gguf_file = HfSource(make() / "hf"), GgufSource(make() / "f16.gguf")
    assert (hf.spec.architecture.feed_forward.activation, hf.spec.layers, hf.spec.ffn, hf.spec.context) == (
        "relu",
        LAYERS,
        256,
        4096,
    )
    assert hf.names() >= gguf_file.names()
    assert hf.tokenizer is not None
    assert (hf.tokenizer.eos_ids, hf.tokenizer.add_bos) == ((2,), False)


@pytest.mark.parametrize(
    "flags",
    [
        ["--hidden", "100"],
        ["--hidden", "many"],
        ["--ffn", "40"],
        ["--heads", "3"],
        ["--heads", "4", "--kv-heads", "3"],
        ["--layers", "0"],
        ["--rank", "2000"],
        ["--vocab", "260"],
        ["--active", "0"],
        ["--active", "0.9"],
        ["--topics", "0"],
        ["--experts", "4"],
        ["--experts", "4", "--used", "5"],
        ["--used", "2"],
        ["--expert-activation", "relu"],
        ["--experts", "4", "--used", "2", "--skew", "0.96"],
        ["--seed", "-1"],
        ["--dtype", "f8"],
        ["--formats", "hf,onnx"],
        ["--formats", ""],
        ["--unknown"],
    ],
)
def test_bad_flag(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    refused(script, [str(tmp_path / "model"), *flags], capsys)
    assert not list(tmp_path.iterdir())


def test_folder_that_exists(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    refused(script, [str(tmp_path)], capsys)
    refused(script, [str(tmp_path / "notes")], capsys)
    refused(script, [str(tmp_path / "absent" / "model")], capsys)
    assert (tmp_path / "notes").read_text() == "mine"


def refused(script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line."""
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """No file may grow beyond 300 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_size_limit")
@pytest.mark.parametrize("formats", ["hf", "powerinfer", "gguf-q8_0"])
def test_write_that_fails(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], formats: str) -> None:
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert script.main([str(tmp_path / "model"), *options, f"--formats={formats}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_disk_that_is_too_small(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert script.main([str(tmp_path / "model"), *options]) == 1
    assert "are free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
