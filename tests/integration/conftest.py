"""What all integration tests share: a cache of their own, and the default model run by transformers."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.command import link_cache, prepack, run_anew
from tests.integration.forks import forking
from tests.integration.reference import llama_from_gguf
from warmfront.coordinator.engine.engine import Engine


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed models go to a folder that the tests remove; compiled kernels and downloads are in the user's cache."""
    home = tmp_path_factory.mktemp("cache")
    link_cache(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.fspath(home))
        yield
    shutil.rmtree(home / "warmfront" / "models", ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _forking(_own_cache: None) -> Iterator[None]:
    """Workers and commands are forked."""
    with forking():
        yield


@pytest.fixture(scope="session")
def compiled(_own_cache: None, tiny_llama: Callable[..., Path]) -> None:
    """The kernels are compiled, so that no command spends time on it or says so."""
    model = tiny_llama(hidden_act="relu")
    for options in ([], ["--gpu", "host"]):
        assert run_anew("generate", "-m", model, "-p", "Hello", "-n", "2", *options, timeout=900).code == 0


@pytest.fixture(scope="session")
def smollm2_in_transformers(smollm2: Path) -> Any:
    """SmolLM2 as a LlamaForCausalLM: the file's own weights, dequantised to float32."""
    return llama_from_gguf(smollm2)


@pytest.fixture(scope="session")
def scripted(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of models that say the given tokens (texts in the vocabulary, all different) and begin again.

    Whatever the prompt, unless it ends with one of them: the next token is a function of the last one alone.
    """

    def make(*script: str, context: int = 512) -> Path:
        from safetensors.numpy import load_file, save_file
        from tokenizers import Tokenizer

        original = tiny_llama(hidden_size=320, max_position_embeddings=context)
        folder = shutil.copytree(original, tmp_path_factory.mktemp("scripted") / "model")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        said = [tokenizer.token_to_id(text) for text in script]
        follower = dict(zip(said, [*said[1:], said[0]], strict=True))
        weights = load_file(folder / "model.safetensors")
        for name, values in weights.items():
            # What the layers add is nothing: the head sees the token's own embedding.
            weights[name] = values * (not name.endswith(("o_proj.weight", "down_proj.weight")))
        vocab, hidden = weights["model.embed_tokens.weight"].shape
        weights["model.embed_tokens.weight"] = np.eye(vocab, hidden, dtype=np.float32)
        weights["model.norm.weight"][:] = 1
        head = weights["lm_head.weight"] = np.zeros((vocab, hidden), np.float32)
        for token in range(vocab):
            head[follower.get(token, said[0]), token] = 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return prepack(folder)

    return make


@pytest.fixture(scope="session")
def endless(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, compiled: None) -> Path:
    """A tiny ReLU model of 26 groups with a long context, already packed; without a tokenizer its answers never end."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    original = tiny_llama(hidden_act="relu", intermediate_size=400, max_position_embeddings=100_000)
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    Engine.load(str(folder)).close()
    return folder
