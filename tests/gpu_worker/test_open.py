"""Devices by name.  pytest tests/gpu_worker/test_open.py"""

import pytest

from warmfront.gpu_worker.open import open_device
from warmfront.shared.errors import ResourceError


def test_missing_device() -> None:
    with pytest.raises(ResourceError, match=r"^cuda:99: [^\n]+$"):
        open_device("cuda:99")


@pytest.mark.parametrize("name", ["cuda", "cuda:x", "tpu:0", ""])
def test_unknown_device(name: str) -> None:
    with pytest.raises(ResourceError, match="use cuda:N or host"):
        open_device(name)
