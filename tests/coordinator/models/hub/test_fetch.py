"""Fetching from a fake hub, and what is used from the cache.  pytest tests/coordinator/models/hub/test_fetch.py"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from tests.coordinator.models.hub.fake_hub import REVISION, FakeHub
from warmfront.coordinator.models.find import find_model
from warmfront.coordinator.models.hub import client
from warmfront.coordinator.models.hub.fetch import fetch, find
from warmfront.coordinator.models.hub.names import HubName
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError, ResourceError, WarmfrontError

Make = Callable[..., Path]
NAME, GGUF = HubName("org/name", None), HubName("org/name", "Q8_0")
# More than two of the pieces that the library writes at once.
BIG = np.random.default_rng(1).bytes(25 << 20)
JUNK = {"README.md": "hello", "pytorch_model.bin": b"pickled", "flax_model.msgpack": b"", "a/b.json": "{}"}


class Seen:
    """The lines and the progress that a user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def show(self, what: str, done: int, total: int) -> None:
        assert what == "fetching"
        self.progress.append((done, total))

    def find(self, name: HubName) -> Path:
        return find(name, self.say, self.show)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def repository(hub: FakeHub, tiny_llama: Make) -> FakeHub:
    """A hub with a model in several files, and much that is not to be fetched."""
    folder = tiny_llama(max_shard_size="60KB")
    hub.put("org/name", {file.name: file.read_bytes() for file in folder.iterdir()} | JUNK)
    return hub


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_folder(repository: FakeHub, seen: Seen, tmp_path: Path, tiny_llama: Make) -> None:
    path = seen.find(NAME)
    assert path == tmp_path / "hub/models--org--name/snapshots" / REVISION
    wanted = {file.name for file in tiny_llama(max_shard_size="60KB").iterdir()}
    assert {file.name for file in path.iterdir()} == wanted
    assert sorted(repository.fetched()) == sorted(wanted)
    source, expected = open_source(path), open_source(tiny_llama())
    np.testing.assert_array_equal(source.tensor("embed").float32(), expected.tensor("embed").float32())
    (line,) = seen.lines
    assert "fetching org/name (" in line
    assert str(tmp_path / "hub") in line
    assert [done for done, _ in seen.progress] == sorted(done for done, _ in seen.progress)
    assert seen.progress[-1][0] == seen.progress[-1][1]
    # The hub's own tools know what is there.
    (repo,) = huggingface_hub.scan_cache_dir(tmp_path / "hub").repos
    assert (repo.repo_id, repo.nb_files) == ("org/name", len(wanted))
    assert list(repo.refs) == ["main"]


def test_what_is_there_is_used_without_asking(repository: FakeHub, seen: Seen) -> None:
    path = seen.find(NAME)
    repository.asked.clear()
    assert seen.find(NAME) == path
    assert find_model("org/name", seen.say, seen.show) == path
    assert repository.asked == []
    assert len(seen.lines) == 1


def test_a_newer_version_comes_when_it_is_asked_for(repository: FakeHub, seen: Seen) -> None:
    old = seen.find(NAME)
    repository.revision = "f" * 40
    repository.put("org/name", {"generation_config.json": '{"eos_token_id": 3}'})
    assert seen.find(NAME) == old
    repository.asked.clear()
    found = fetch(NAME, seen.say, seen.show)
    assert found.path.name == "f" * 40
    # The rest has the content that is there already.
    assert repository.fetched() == ["generation_config.json"]
    assert seen.find(NAME) == found.path
    assert fetch(NAME, seen.say, seen.show).fetched == 0


def test_a_gguf_file(hub: FakeHub, seen: Seen, tiny_gguf: Make, tmp_path: Path) -> None:
    data = tiny_gguf().read_bytes()
    hub.put("org/name", {"m-Q8_0.gguf": data, "m-Q4_0.gguf": b"no", "config.json": "{}"})
    with pytest.raises(ModelError, match=r"several files could be meant; choose one of m-Q4_0\.gguf, m-Q8_0\.gguf"):
        seen.find(NAME)
    for name in (GGUF, NAME, HubName("org/name", "m-Q8_0.gguf"), HubName("org/name", "q8_0")):
        path = seen.find(name)
        assert path.name == "m-Q8_0.gguf"
        assert open_source(path).spec.hidden == 256
    assert hub.fetched() == ["m-Q8_0.gguf"]


def test_the_only_gguf_file_needs_no_name(hub: FakeHub, seen: Seen) -> None:
    hub.put("org/name", {"m.gguf": b"GGUF", "mmproj-m.gguf": b"GGUF", "README.md": ""})
    assert seen.find(NAME).name == "m.gguf"


def test_all_parts_of_a_split_file(hub: FakeHub, seen: Seen) -> None:
    parts = {f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf": b"GGUF%d" % i for i in (1, 2, 3)}
    hub.put("org/name", parts)
    path = seen.find(GGUF)
    assert [file.read_bytes() for file in sorted(path.parent.iterdir())] == [b"GGUF1", b"GGUF2", b"GGUF3"]
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    sorted(path.parent.iterdir())[1].unlink()
    hub.asked.clear()
    assert seen.find(GGUF) == path
    assert hub.fetched() == []  # the content is still there


def test_a_connection_that_breaks_is_taken_up_again(hub: FakeHub, seen: Seen, capfd: Any) -> None:
    hub.put("org/name", {"m-Q8_0.gguf": BIG})
    hub.cut_at, hub.cuts = 12 << 20, 1
    assert seen.find(GGUF).read_bytes() == BIG
    assert hub.ranges() == [None, f"bytes={10 << 20}-"]
    assert capfd.readouterr() == ("", "")
    assert seen.progress[-1] == (len(BIG), len(BIG))


class InterruptError(BaseException):
    """As Ctrl-C raises it."""


def interrupted(hub: FakeHub, tmp_path: Path) -> Path:
    """What a run leaves that ends after a piece of `BIG`."""

    def interrupt(_what: str, done: int, _total: int) -> None:
        if done:
            raise InterruptError

    hub.put("org/name", {"m-Q8_0.gguf": BIG})
    with pytest.raises(InterruptError):
        find(GGUF, print, interrupt)
    (partial,) = (tmp_path / "hub/models--org--name/blobs").iterdir()
    assert partial.name.endswith(".incomplete")
    assert 0 < partial.stat().st_size < len(BIG)
    return partial


def test_a_later_run_goes_on(hub: FakeHub, seen: Seen, tmp_path: Path) -> None:
    partial = interrupted(hub, tmp_path)
    size = partial.stat().st_size
    hub.asked.clear()
    assert seen.find(GGUF).read_bytes() == BIG
    assert hub.ranges() == [f"bytes={size}-"]
    assert seen.progress[0] == (size, len(BIG))
    assert not partial.exists()


@pytest.mark.parametrize("size", [5, len(BIG), len(BIG) + 5])
def test_what_an_earlier_run_left_must_fit(hub: FakeHub, seen: Seen, tmp_path: Path, size: int) -> None:
    partial = interrupted(hub, tmp_path)
    partial.write_bytes(bytes(size))
    assert seen.find(GGUF).read_bytes() == BIG


def test_offline(repository: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(
        ModelError, match=r"org/name is not in the cache, and HF_HUB_OFFLINE is set: unset it to fetch it"
    ):
        seen.find(NAME)
    monkeypatch.undo()
    assert repository.asked == []


def test_offline_with_a_copy(repository: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = seen.find(NAME)
    offline(monkeypatch)
    repository.asked.clear()
    assert seen.find(NAME) == path
    # As left by a program that wanted the weights alone.
    (path / "tokenizer_config.json").unlink()
    seen.lines.clear()
    assert seen.find(NAME) == path
    (line,) = seen.lines
    assert line.startswith("org/name may lack some of its tokenizer here, and the hub cannot be asked")
    shard = sorted(path.glob("*-00001-of-*"))[0]
    shard.unlink()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        seen.find(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert seen.find(NAME) == path
    assert shard.exists()


REFUSALS: list[tuple[str, int, dict[str, str], str]] = [
    ("org/name", 401, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at http.*/org/name, and set HF_TOKEN"),
    ("org/name:config.json", 403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms"),
    (
        "org/name",
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        "refuses the token .*HF_TOKEN",
    ),
    ("org/name", 403, {}, "forbids org/name: set HF_TOKEN"),
    ("org/name", 404, {"X-Error-Code": "RevisionNotFound"}, "is empty"),
    ("org/name", 500, {}, "answers 500 for org/name: try again later"),
    ("org/name:config.json", 404, {"X-Error-Code": "EntryNotFound"}, "has no file config.json: choose another one"),
]


@pytest.mark.parametrize(("what", "status", "headers", "message"), REFUSALS)
def test_refusals(
    repository: FakeHub, seen: Seen, what: str, status: int, headers: dict[str, str], message: str
) -> None:
    repository.refused[what] = (status, headers)
    with pytest.raises(ModelError, match=message) as caught:
        seen.find(NAME)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_token_is_sent(repository: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen.find(NAME)
    assert {asked[3] for asked in repository.asked if "agent" not in asked[1]} == {"Bearer hf_secret"}


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_a_repository_that_is_not_there(
    hub: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        ModelError, match=r"no such model: org/name is neither a file or folder here nor a repository on"
    ):
        seen.find(NAME)


def test_no_network(hub: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of "discard", where nobody listens
    with pytest.raises(ModelError, match=r"cannot fetch org/name from http://127\.0\.0\.1:9: .*check the network"):
        seen.find(NAME)


def test_a_local_path_wins(hub: FakeHub, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert find_model("org/name", seen.say, seen.show) == Path("org/name")
    assert hub.asked == []


@pytest.mark.parametrize("model", ["none", "a/b/c", "./org/name", "org/name.gguf"])
def test_what_is_neither(hub: FakeHub, seen: Seen, model: str) -> None:
    with pytest.raises(ModelError, match=r"^no such model: .*give a GGUF file, .* ORG/NAME:Q4_K_M, or smollm2-135m"):
        find_model(model, seen.say, seen.show)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "'bert' is an encoder"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}, "is quantised by hqq"),
    ],
)
def test_a_model_that_does_not_run_is_not_fetched(
    hub: FakeHub, seen: Seen, config: dict[str, Any], message: str
) -> None:
    hub.put("org/name", {"config.json": json.dumps(config), "model.safetensors": BIG})
    with pytest.raises(ModelError, match=message):
        seen.find(NAME)
    assert hub.fetched() == ["config.json"]


def test_pickled_weights_are_not_fetched(hub: FakeHub, seen: Seen) -> None:
    hub.put("org/name", {"config.json": '{"model_type": "llama"}', "pytorch_model.bin": b"pickled"})
    with pytest.raises(ModelError, match=r"org/name has its weights only as pytorch_model\.bin, which is pickled"):
        seen.find(NAME)
    assert hub.fetched() == []


@pytest.mark.parametrize("where", ["../../../outside.safetensors", "/etc/passwd", "a\\b", "model.bin"])
def test_an_index_that_leads_elsewhere(hub: FakeHub, seen: Seen, where: str, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": where}})
    files = {"config.json": '{"model_type": "llama"}', "model.safetensors.index.json": index, where: b"x"}
    hub.put("org/name", files)
    with pytest.raises(ModelError, match="which is no safetensors file of the folder"):
        seen.find(NAME)
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize("etag", ["../../../evil", "..", "a/b", ""])
def test_names_that_the_hub_may_not_give_content(
    repository: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, etag: str
) -> None:
    monkeypatch.setattr(repository, "etag", lambda _data: etag)
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelError, match="ETag"):
        seen.find(NAME)
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "hub"}
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("revision", ["../../evil", "main", "0" * 39])
def test_commits_that_are_none(repository: FakeHub, seen: Seen, revision: str) -> None:
    repository.revision = revision
    with pytest.raises(ModelError, match=r"cannot fetch org/name .*its commit is"):
        seen.find(NAME)


def test_links_that_lead_out_of_the_cache(repository: FakeHub, seen: Seen, tmp_path: Path) -> None:
    path = seen.find(NAME)
    (tmp_path / "secret").write_text("{}")
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json does not lie in the model's folder"):
        seen.find(NAME)


@pytest.mark.parametrize("text", ["../../../other", "", "\0", "x" * 40])
def test_refs_that_lead_elsewhere(repository: FakeHub, seen: Seen, tmp_path: Path, text: str) -> None:
    path = seen.find(NAME)
    (tmp_path / "hub/models--org--name/refs/main").write_text(text)
    assert seen.find(NAME) == path  # asked for again
    assert (tmp_path / "hub/models--org--name/refs/main").read_text() == REVISION


def test_content_that_several_repositories_share(
    repository: FakeHub, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub 2 keeps what it fetched from xet: blobs are links too."""
    path = seen.find(NAME)
    blob = (path / "config.json").resolve()
    shared = tmp_path / "hub/blobs/ab" / ("ab" + "0" * 62)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    offline(monkeypatch)
    assert open_source(seen.find(NAME)).spec.layers == 2
    (tmp_path / "hub/blobs/cd").mkdir()
    blob.unlink()
    blob.symlink_to(shutil.move(shared, tmp_path / "hub/blobs/cd"))
    with pytest.raises(ModelError, match="does not lie in"):
        seen.find(NAME)


def test_no_room(repository: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ResourceError, match=r"no room for org/name in .*are needed, 0\.00 GB are free; .*HF_HOME"):
        seen.find(NAME)


def test_a_disk_that_is_full_meanwhile(
    hub: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put("org/name", {"m-Q8_0.gguf": BIG})
    write = client._Counted.write

    def full(self: Any, data: Any) -> int:
        if self.tell() > 15 << 20:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(client._Counted, "write", full)
    with pytest.raises(ResourceError, match=r"no room for org/name:m-Q8_0\.gguf in .*: No space left on device"):
        seen.find(GGUF)
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written(repository: FakeHub, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/self/hub")
    with pytest.raises(WarmfrontError, match=r"/proc/self/hub"):
        seen.find(NAME)
