"""What all integration tests share: a cache of their own, and the default model run by transformers."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import link_cache, run
from tests.integration.reference import llama_from_gguf


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed models go to a folder that the tests remove; compiled kernels and downloads are the user's."""
    home = tmp_path_factory.mktemp("cache")
    link_cache(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.fspath(home))
        yield
    shutil.rmtree(home / "warmfront" / "models", ignore_errors=True)


@pytest.fixture(scope="session")
def compiled(_own_cache: None, tiny_llama: Callable[..., Path]) -> None:
    """The kernels are compiled, so that no command spends time on it or says so."""
    model = tiny_llama(hidden_act="relu")
    for options in ([], ["--gpu", "host"]):
        assert run("generate", "-m", model, "-p", "Hello", "-n", "2", *options, timeout=900).code == 0


@pytest.fixture(scope="session")
def smollm2_in_transformers(smollm2: Path) -> Any:
    """SmolLM2 as a LlamaForCausalLM: the file's own weights, dequantised to float32."""
    return llama_from_gguf(smollm2)
