"""Orders of neurons that others have published.  pytest tests/coordinator/models/test_published_order.py"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from warmfront.coordinator.models.published_order import read_order
from warmfront.shared.errors import ModelError

LAYERS, FFN = 3, 80
ORDERS = np.random.default_rng(0).permuted(np.tile(np.arange(FFN, dtype=np.int32), (LAYERS, 1)), axis=1)


def split_file(path: Path, orders: Any) -> Path:
    """As SparkInfer writes it: no architecture, the sizes of its groups and the layers' shares of the GPU."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_int32("ffn_group_size", 16)
    writer.add_array("ffn_normalized_pattern", [1 / LAYERS] * LAYERS)
    for layer, order in enumerate(orders):
        writer.add_tensor(f"blk.{layer}.ffn_reorder_perms", order)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def counts_folder(path: Path, counts: Any) -> Path:
    path.mkdir()
    for layer, tensor in enumerate(counts):
        torch.save(torch.as_tensor(tensor), path / f"activation_{layer}.pt")
    return path


def test_a_split_file(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_order(split_file(tmp_path / "split.gguf", ORDERS), LAYERS, FFN), ORDERS)


def test_a_folder_of_counts(tmp_path: Path) -> None:
    """The most frequent first; of equals, the first."""
    counts = [np.arange(FFN), np.arange(FFN)[::-1].astype(np.float32).copy(), np.zeros(FFN, np.float16)]
    upwards = np.arange(FFN)
    expected = [upwards[::-1], upwards, upwards]
    np.testing.assert_array_equal(read_order(counts_folder(tmp_path / "counts", counts), LAYERS, FFN), expected)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (ORDERS[:2], "has no blk.2.ffn_reorder_perms of 80 neurons; give the split file that belongs to the model"),
        (ORDERS[:, :48], "has no blk.0.ffn_reorder_perms of 80 neurons"),
        (ORDERS.astype(np.float32), "has no blk.0.ffn_reorder_perms of 80 neurons"),
        ([*ORDERS, ORDERS[0]], "is for a model of more than 3 layers"),
        (np.minimum(ORDERS, 78), "blk.0.ffn_reorder_perms does not hold each neuron once; fetch it again"),
        (ORDERS - 1, "blk.0.ffn_reorder_perms does not hold each neuron once"),
    ],
)
def test_split_files_that_are_refused(tmp_path: Path, orders: Any, message: str) -> None:
    with pytest.raises(ModelError, match=rf"split\.gguf:? {message}"):
        read_order(split_file(tmp_path / "split.gguf", orders), LAYERS, FFN)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((2, FFN)), r"activation_2\.pt is missing"),
        (np.ones((3, 8)), r"activation_0\.pt has shape \(8,\), not one count for each of 80 neurons"),
        (np.full((3, FFN), np.nan), r"activation_0\.pt holds NaN"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, counts: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_order(counts_folder(tmp_path / "counts", counts), LAYERS, FFN)
