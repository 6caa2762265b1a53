"""Sparse models as they are published, against their arithmetic in float64 numpy.

Each file is written here from a tiny random model, with the names and quirks of its dialect. Prompts are computed
densely, the tokens behind them by the neurons that predictors choose, where the model has them.

Run: pytest tests/integration/test_sparse_models.py
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import torch

from tests.activations import described, firing
from tests.coordinator.models.hf.folders import edited
from tests.family_models import write_model
from tests.integration.command import prepack, run
from tests.integration.gpu import budget_for
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.errors import ModelError

Doubles = npt.NDArray[np.float64]
Make = Callable[..., Path]
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, RANK = 3, 64, 96, 4, 2, 16, 24
PROMPT, NEW = [5, 17, 200, 42, 101, 7, 250, 33], 24
GPU = {"gpu": "host", "policy": "static", "vram_budget": budget_for(4, hidden=HIDDEN, ffn=FFN)}
SHAPE = {"num_hidden_layers": LAYERS, "hidden_act": "relu", "seed": 4}


def factors(name: str, gates: Doubles, ups: Doubles) -> Doubles:
    """What is multiplied with the down rows, by the formulas that were published."""
    kind, _, threshold = name.partition(":")
    if kind == "silu":
        return gates / (1 + np.exp(-gates)) * ups
    if kind == "fatrelu":
        return np.where(gates > float(threshold), gates, 0) * ups
    return np.maximum(gates, 0) * (np.maximum(ups, 0) if kind == "drelu" else ups)


@dataclass
class Reference:
    """A Llama in float64, token by token."""

    weights: dict[str, Any]
    activation: str
    # By layer: fc1 [r, hidden], its bias, fc2 [ffn, r], its bias.
    predictors: list[tuple[Doubles, Doubles, Doubles, Doubles]] | None = None
    # What the predictors read, whether the layer before, and their threshold.
    normed: bool = False
    ahead: bool = False
    threshold: float = 0.0
    # Factors on embeddings, on what a block adds, and on the logits.
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def answer(self, prompt: list[int], count: int) -> list[int]:
        """The greedy tokens behind the prompt."""
        self._keys: list[list[Doubles]] = [[] for _ in range(LAYERS)]
        self._values: list[list[Doubles]] = [[] for _ in range(LAYERS)]
        for at, token in enumerate(prompt):
            logits = self._step(token, at, False)
        answer = [int(np.argmax(logits))]
        while len(answer) < count:
            logits = self._step(answer[-1], len(prompt) + len(answer) - 1, True)
            answer.append(int(np.argmax(logits)))
        return answer

    def _of(self, name: str) -> Doubles:
        return np.asarray(self.weights[name], np.float64)

    def _norm(self, x: Doubles, name: str) -> Doubles:
        return np.asarray(x / np.sqrt((x * x).mean() + 1e-6) * self._of(name))

    def _rotated(self, heads: Doubles, at: int) -> Doubles:
        angles = at * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        a, b = heads[:, : HEAD_DIM // 2], heads[:, HEAD_DIM // 2 :]
        return np.hstack((a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)))

    def _attention(self, layer: int, h: Doubles, at: int) -> Doubles:
        here = f"model.layers.{layer}.self_attn."
        q, k, v = (
            (self._of(f"{here}{part}_proj.weight") @ h + self.weights.get(f"{here}{part}_proj.bias", 0)).reshape(
                -1, HEAD_DIM
            )
            for part in "qkv"
        )
        self._keys[layer].append(self._rotated(k, at))
        self._values[layer].append(v)
        keys, values = (np.repeat(np.array(each[layer]), HEADS // KV_HEADS, 1) for each in (self._keys, self._values))
        scores = np.einsum("hd,thd->ht", self._rotated(q, at), keys) / np.sqrt(HEAD_DIM)
        share = np.exp(scores - scores.max(1, keepdims=True))
        mixed = np.einsum("ht,thd->hd", share / share.sum(1, keepdims=True), values)
        return np.asarray(self._of(f"{here}o_proj.weight") @ mixed.ravel())

    def _chosen(self, layer: int, x: Doubles) -> npt.NDArray[np.bool_]:
        assert self.predictors is not None
        fc1, bias1, fc2, bias2 = self.predictors[layer]
        return np.asarray(fc2 @ np.maximum(fc1 @ x + bias1, 0) + bias2 > self.threshold)

    def _step(self, token: int, at: int, sparse: bool) -> Doubles:
        x, before = self.scales[0] * self._of("model.embed_tokens.weight")[token], None
        for layer in range(LAYERS):
            here = f"model.layers.{layer}."
            x = x + self.scales[1] * self._attention(layer, self._norm(x, f"{here}input_layernorm.weight"), at)
            h = self._norm(x, f"{here}post_attention_layernorm.weight")
            gates, ups = (self._of(f"{here}mlp.{part}_proj.weight") @ h for part in ("gate", "up"))
            each = factors(self.activation, gates, ups)
            if sparse and self.predictors is not None:
                seen = h if self.normed else x
                each = each * self._chosen(layer, before if self.ahead and before is not None else seen)
                before = seen
            x = x + self.scales[1] * (self._of(f"{here}mlp.down_proj.weight") @ each)
        return np.asarray(self.scales[2] * (self._of("lm_head.weight") @ self._norm(x, "model.norm.weight")))


def random_predictors(biased: bool) -> list[tuple[Doubles, Doubles, Doubles, Doubles]]:
    """Some that choose about half of the neurons."""
    rng = np.random.default_rng(9)
    shapes = ((RANK, HIDDEN), (RANK,), (FFN, RANK), (FFN,))
    made = [tuple(rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes) for _ in range(LAYERS)]
    return [(a, b * biased, c, d * biased) for a, b, c, d in made]  # type: ignore[misc]


def weights_of(folder: Path) -> dict[str, Any]:
    return dict(safetensors.numpy.load_file(folder / "model.safetensors"))


def check(path: Path, reference: Reference, selector: str, **overrides: Any) -> None:
    with Engine.load(str(path), dtype="f32", verify=True, **overrides) as engine:
        assert engine.model.spec.activation == reference.activation
        assert engine.plan.selector.name == selector
        assert engine.decode_ids(PROMPT, NEW - 1) == reference.answer(PROMPT, NEW)[: NEW - 1]


def test_the_reference_knows_the_formulas() -> None:
    gates, ups = np.random.default_rng(0).normal(size=(2, 50))
    for name in ("relu", "drelu", "fatrelu:0.3"):
        assert ((factors(name, gates, ups) != 0) == firing(name, gates, ups)).all()
        assert described(name).sparse


@pytest.mark.parametrize("overrides", [{}, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.2}, "fatrelu:0.2"),  # ProSparse
        ({"model_type": "llama_sparse_relu", "hidden_act": "silu"}, "relu"),  # SparseLM
        ({"model_type": "bamboo", "sliding_window": 4096}, "drelu"),  # Bamboo
    ],
    ids=["prosparse", "sparselm", "bamboo"],
)
def test_folders(
    tiny_llama: Make, tmp_path: Path, changes: dict[str, Any], activation: str, overrides: dict[str, Any]
) -> None:
    folder = edited(tiny_llama(**SHAPE), tmp_path / "model", **changes)
    check(folder, Reference(weights_of(folder), activation), "exact", **overrides)


# As published: embeddings times 12, blocks times 1.4 / sqrt(layers), logits by the width of a model of 256.
MINICPM_SCALES = (12.0, 1.4 / LAYERS**0.5, 256 / HIDDEN)


def test_minicpm_s(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(
        tiny_llama(**SHAPE),
        tmp_path / "model",
        model_type="minicpm",
        hidden_act="fatrelu",
        hidden_act_param=0.03,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
        tie_word_embeddings=None,
    )
    check(folder, Reference(weights_of(folder), "fatrelu:0.03", scales=MINICPM_SCALES), "exact")


@pytest.mark.parametrize(
    ("architecture", "name", "activation"),
    [
        ("llama", "ReluLLaMA-7B", "relu"),
        ("minicpm", "MiniCPM-S-1B-sft", "fatrelu:0.03"),
        ("bamboo", "some", "drelu"),
        ("qwen2", "some", "silu"),
    ],
    ids=["relullama", "minicpm-s", "bamboo", "qwen2"],
)
def test_gguf_files_without_predictors(
    tiny_llama: Make, tmp_path: Path, architecture: str, name: str, activation: str
) -> None:
    """llama.cpp's, and SparkInfer's, whose `pred_lora` is then all zeros. Without a tokenizer nothing is measured."""
    folder = write_model(tmp_path / "qwen2", "qwen2") if architecture == "qwen2" else tiny_llama(**SHAPE)
    scales = MINICPM_SCALES if architecture == "minicpm" else (1.0, 1.0, 1.0)
    path = write_gguf(tmp_path / "model.gguf", folder, architecture, "", {}, name)
    selector = "all" if activation == "silu" else "exact"
    check(path, Reference(weights_of(folder), activation, scales=scales), selector)


def turbosparse(folder: Path, path: Path) -> Path:
    """The folder with predictors among the model's own tensors."""
    edited(folder, path, model_type="bamboo")
    weights = weights_of(path)
    for layer, (fc1, _, fc2, _) in enumerate(random_predictors(False)):
        weights |= {f"model.layers.{layer}.mlp.predictor.fc{i}.weight": fc for i, fc in ((1, fc1), (2, fc2))}
    safetensors.numpy.save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("overrides", [{}, {"attention": "host"}, GPU], ids=["cpu", "torch", "gpu"])
def test_turbosparse(tiny_llama: Make, tmp_path: Path, overrides: dict[str, Any]) -> None:
    """Predictors on the residual, whose masks count: without them the answer is another."""
    folder = turbosparse(tiny_llama(**SHAPE), tmp_path / "model")
    reference = Reference(weights_of(folder), "drelu", random_predictors(False))
    check(folder, reference, "lowrank", **overrides)
    assert reference.answer(PROMPT, NEW) != Reference(weights_of(folder), "drelu").answer(PROMPT, NEW)


def with_torch_files(folder: Path, path: Path, biased: bool) -> Path:
    shutil.copytree(folder, path)
    for layer, (fc1, bias1, fc2, bias2) in enumerate(random_predictors(biased)):
        state = {"fc1.weight": fc1, "fc2.weight": fc2} | ({"fc1.bias": bias1, "fc2.bias": bias2} if biased else {})
        torch.save({name: torch.from_numpy(values) for name, values in state.items()}, path / f"model_{layer}.pt")
    return path


def test_predictors_that_choose_nothing(tiny_llama: Make, tmp_path: Path) -> None:
    """All is well with their numbers, but no logit is above the threshold: that is said."""
    folder = shutil.copytree(tiny_llama(**SHAPE), tmp_path / "model")
    shapes = ((i, part, shape) for i in range(LAYERS) for part, shape in (("fc1", (8, HIDDEN)), ("fc2", (FFN, 8))))
    tensors = {f"layers.{i}.{part}.weight": np.ones(shape, np.float32) for i, part, shape in shapes}
    safetensors.numpy.save_file(tensors, folder / "predictor.safetensors", {"threshold": "1e30"})
    outcome = run("generate", "-m", prepack(folder), "--prompt-ids", "5,6,7", "-n", "4")
    assert outcome.code == 0
    assert outcome.err.endswith("\nthe predictors of model chose no neuron for any token: pass --selector exact\n")
    assert run("generate", "-m", folder, "--prompt-ids", "5,6,7", "-n", "4", "--selector", "exact").err == ""


@pytest.mark.parametrize("biased", [False, True])
def test_folders_of_predictors(tiny_llama: Make, tmp_path: Path, biased: bool) -> None:
    folder = with_torch_files(tiny_llama(**SHAPE), tmp_path / "model", biased)
    reference = Reference(weights_of(folder), "relu", random_predictors(biased), normed=biased, ahead=biased)
    check(folder, reference, "lowrank")
    (folder / "model_2.pt").unlink()
    with pytest.raises(ModelError, match=r"model_2\.pt is missing: there must be predictors for each of 3 layers$"):
        Engine.load(str(folder))


def write_gguf(
    path: Path, folder: Path, architecture: str, dialect: str, fields: dict[str, Any], name: str = "some"
) -> Path:
    """The folder's model as a GGUF file in that dialect, with predictors unless it is llama.cpp's, ""."""
    weights, config = weights_of(folder), json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_name(name)
    if dialect != "powerinfer":
        writer.add_array(f"{architecture}.pred_lora", [RANK * (dialect == "sparkinfer")] * LAYERS)
    for key, value in fields.items():
        writer.add_float32(key, value)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN2 if architecture == "qwen2" else gguf.MODEL_ARCH.LLAMA, LAYERS
    )
    for published, values in weights.items():
        ours = names.get_name(published, try_suffixes=(".weight", ".bias"))
        assert ours is not None
        if architecture != "qwen2" and (".q_proj" in published or ".k_proj" in published):
            values = values.reshape(-1, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        if ".down_proj" in published and dialect:
            values, ours = values.T, ours.replace("ffn_down", "ffn_down_t" if dialect == "powerinfer" else "ffn_down")
        writer.add_tensor(ours, np.ascontiguousarray(values))
    for layer, (fc1, bias1, fc2, bias2) in enumerate(random_predictors(dialect == "sparkinfer") if dialect else []):
        up, down = ("fc1", "fc2") if dialect == "powerinfer" else ("ffn_pred_up", "ffn_pred_down")
        writer.add_tensor(f"blk.{layer}.{up}.weight", fc1)
        writer.add_tensor(f"blk.{layer}.{down}.weight", fc2)
        if dialect == "sparkinfer":
            writer.add_tensor(f"blk.{layer}.{up}.bias", bias1)
            writer.add_tensor(f"blk.{layer}.{down}.bias", bias2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "activation"), [("bamboo", "drelu"), ("llama", "relu")])
def test_powerinfer(tiny_llama: Make, tmp_path: Path, architecture: str, activation: str) -> None:
    folder = tiny_llama(**SHAPE)
    fields = {"powerinfer.sparse_threshold": -0.25}
    path = write_gguf(tmp_path / "model.gguf", folder, architecture, "powerinfer", fields)
    with path.open("r+b") as file:
        file.write(b"PWRI")
    check(path, Reference(weights_of(folder), activation, random_predictors(False), threshold=-0.25), "lowrank")


@pytest.mark.parametrize(
    ("architecture", "activation", "overrides"),
    [
        ("prosparse-llama", "fatrelu:0.01", {}),
        ("prosparse-llama", "fatrelu:0.01", {"attention": "host"}),
        ("bamboo", "drelu", GPU),
        ("qwen2", "drelu", {}),
    ],
    ids=["prosparse", "prosparse-torch", "bamboo", "qwen2"],
)
def test_sparkinfer(
    tiny_llama: Make, tmp_path: Path, architecture: str, activation: str, overrides: dict[str, Any]
) -> None:
    """Predictors look ahead: a layer's read what the layer before computes with; the first one's read their own."""
    folder = tiny_llama(**SHAPE)
    if architecture == "qwen2":
        folder = tmp_path / "qwen2"
        write_model(folder, "qwen2", head_dim=HEAD_DIM)
    path = write_gguf(tmp_path / "model.gguf", folder, architecture, "sparkinfer", {})
    reference = Reference(weights_of(folder), activation, random_predictors(True), normed=True, ahead=True)
    check(path, reference, "lowrank", **overrides)
    assert reference.answer(PROMPT, NEW) != Reference(weights_of(folder), activation).answer(PROMPT, NEW)


def test_sparse_qwen2(tmp_path: Path) -> None:
    """Its config says relu and it was trained with dReLU; nothing in so small a model can tell, so that is taken."""
    folder = write_model(tmp_path / "model", "qwen2", hidden_act="relu")
    check(folder, Reference(weights_of(folder), "drelu"), "exact")
