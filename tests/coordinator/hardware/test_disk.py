"""What the disk gives to reads of a size.  pytest tests/coordinator/hardware/test_disk.py"""

from pathlib import Path

import pytest

from warmfront.coordinator.hardware import disk
from warmfront.shared.errors import ResourceError


def test_reads_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SECONDS", 0.05)
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    assert disk.disk_bandwidth(file, 12_000) > 1e6
    # Longer than the file, or nothing of it.
    assert disk.disk_bandwidth(file, 4 << 20) > 1e6
    assert disk.disk_bandwidth(file, 0) > 1e6
    file.write_bytes(b"")
    assert disk.disk_bandwidth(file, 4096) == 0


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"cannot read {tmp_path}/none: No such file"):
        disk.disk_bandwidth(tmp_path / "none", 4096)
