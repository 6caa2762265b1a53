"""State dicts of torch.save, read without torch.  pytest tests/coordinator/models/hf/test_torch_file.py"""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from warmfront.coordinator.models.hf.safetensors_file import KINDS
from warmfront.coordinator.models.hf.torch_file import NUMBERS, read_state_dict, read_tensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two of one storage, one of them behind its beginning."""
    both = torch.randn(7, 64).to(dtype)
    state = {"fc1.weight": both[:3], "fc2.weight": both[3:], "fc1.bias": torch.randn(5).to(dtype)}
    torch.save(state, tmp_path / "model.pt")
    found = read_state_dict(tmp_path / "model.pt")
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert tensor.shape == tuple(state[name].shape)
        values = unpack(tensor.rows(), KINDS[tensor.type], tensor.shape[-1])
        np.testing.assert_array_equal(values.reshape(tensor.shape), state[name].float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64, torch.float16])
def test_a_lone_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = (1000 * torch.rand(70)).to(dtype)
    torch.save(numbers, tmp_path / "activation_0.pt")
    found = read_tensor(tmp_path / "activation_0.pt")
    np.testing.assert_array_equal(found.rows().view(NUMBERS[found.type])[0], numbers.numpy())
    torch.save({"counts": numbers}, tmp_path / "activation_0.pt")
    with pytest.raises(
        ModelError, match=r"activation_0\.pt is not a plain tensor \(it holds something other than one\)"
    ):
        read_tensor(tmp_path / "activation_0.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/evil",)


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("model/data.pkl", pickled)
            archive.writestr("model/data/0", bytes(64))

    return write


def saved(state: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(state, path)


def cut(path: Path) -> None:
    torch.save({"fc1.weight": torch.ones(9, 9)}, path)
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (saved({"fc1.weight": Evil()}), "it refers to posix.mkdir"),
        (saved(torch.nn.Linear(3, 3)), "it refers to torch.nn.modules.linear.Linear"),
        (saved({"fc1.weight": torch.ones(3, 4).T}), "a tensor is a view of another"),
        (saved({"fc1.weight": torch.ones(4, dtype=torch.int8)}), "it refers to torch.CharStorage"),
        (saved({"epoch": 3}), "something other than named tensors"),
        (saved([torch.ones(3)]), "something other than named tensors"),
        (zipped(b"\x80\x02r\xff\xff\xff\xff."), "plain state dict"),  # remembers its 4294967295th object
        (zipped(b"\x80\x02B\xff\xff\xff\xff."), "plain state dict"),  # 4 GB of bytes
        (zipped(b"\x80\x02(U\x07storagecos\nsystem\nU\x010U\x03cpuK\x04tQ."), "it refers to os.system"),
        (zipped(pickle.dumps({})[:-1]), "plain state dict"),
        (zipped(bytes(1 << 21), zipfile.ZIP_DEFLATED), "its index has 2097152 bytes"),
        (cut, "plain state dict"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "not a zip file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, write: Callable[[Path], Any], reason: str) -> None:
    """In one line; nothing that they name is called."""
    write(tmp_path / "model_0.pt")
    with pytest.raises(
        ModelError, match=r"model_0\.pt is not a plain state dict \(.*; save the weights alone"
    ) as caught:
        read_state_dict(tmp_path / "model_0.pt")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/evil").exists()


def test_storages_that_lie(tmp_path: Path) -> None:
    """A storage that has fewer numbers than the tensor says is not read."""
    torch.save({"fc1.weight": torch.ones(4, 4)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
        for info in whole.infolist():
            data = whole.read(info)
            short.writestr(info.filename, data[:-4] if info.filename.endswith("data/0") else data)
    with pytest.raises(ModelError, match=r"fc1\.weight does not fit its storage"):
        read_state_dict(tmp_path / "short.pt")
