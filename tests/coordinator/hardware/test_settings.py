"""What tuning keeps, and when it is taken.  pytest tests/coordinator/hardware/test_settings.py"""

import json
import threading
from pathlib import Path

import pytest

from warmfront.coordinator.hardware import settings
from warmfront.coordinator.hardware.settings import Setting, keep_setting, kept_setting, tuned, tuning_file
from warmfront.shared.config import EngineConfig
from warmfront.shared.machine.topology import Node, Topology

MODEL, OTHER = Path("/models/tiny-f16-12ab.safetensors"), Path("/models/tiny-q8-34cd.safetensors")
FOUND = Setting(workers=2, threads=4, coordinator_threads=3, spins=50)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_kept_by_model_and_weight_type() -> None:
    assert kept_setting(MODEL) is None
    keep_setting(MODEL, FOUND, 12.345)
    keep_setting(OTHER, FOUND._replace(spins=0), 1.0)
    assert kept_setting(MODEL) == FOUND
    assert kept_setting(OTHER) == FOUND._replace(spins=0)
    keep_setting(MODEL, FOUND._replace(workers=1), 13)
    assert kept_setting(MODEL) == FOUND._replace(workers=1)
    assert len(json.loads(tuning_file().read_text())) == 2


def test_two_that_keep_theirs_at_once_lose_neither() -> None:
    models = [Path(f"/models/m{i}-f16-00.safetensors") for i in range(8)]
    threads = [threading.Thread(target=keep_setting, args=(model, FOUND, 1.0)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all(kept_setting(model) == FOUND for model in models)


def test_another_machine_does_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_setting(MODEL, FOUND, 1)
    kept = json.loads(tuning_file().read_text())
    tuning_file().write_text(json.dumps({key.partition("@")[0] + "@other": value for key, value in kept.items()}))
    assert kept_setting(MODEL) is None


@pytest.mark.parametrize("damage", ["", "[]", "{", "null", '{"KEY": 3}', '{"KEY": {"workers": "x"}}'])
def test_a_damaged_file_is_ignored_and_replaced(damage: str) -> None:
    keep_setting(MODEL, FOUND, 1)
    (key,) = json.loads(tuning_file().read_text())
    tuning_file().write_text(damage.replace("KEY", key))
    assert kept_setting(MODEL) is None
    keep_setting(MODEL, FOUND, 1)
    assert kept_setting(MODEL) == FOUND


def test_numbers_that_cannot_be_are_none() -> None:
    keep_setting(MODEL, FOUND._replace(threads=0), 1)
    assert kept_setting(MODEL) is None


def test_taken_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "read_topology", lambda: Topology((Node(0, ((0,), (1,), (2,), (3,)), 1, 1),)))
    keep_setting(MODEL, FOUND, 1)
    said: list[str] = []
    config = tuned(EngineConfig(dtype="f16"), MODEL, None, said.append)
    assert config == EngineConfig(dtype="f16", workers=2, threads=4, coordinator_threads=3, spins=50)
    assert said == ["as tuned: 2 x 2 threads, 3 of the coordinator, 50 spins"]
    for chosen in (
        EngineConfig(tuning=False),
        EngineConfig(workers=1),
        EngineConfig(threads=1),
        EngineConfig(coordinator_threads=1),
        EngineConfig(spins=7),
        EngineConfig(force=True),
    ):
        assert tuned(chosen, MODEL, None, said.append) == chosen
    assert tuned(EngineConfig(), MODEL, "host", said.append) == EngineConfig()
    assert tuned(EngineConfig(), OTHER, None, said.append) == EngineConfig()
    assert len(said) == 1


def test_left_out_where_it_does_not_fit() -> None:
    keep_setting(MODEL, FOUND._replace(threads=10_000), 1)
    said: list[str] = []
    assert tuned(EngineConfig(), MODEL, None, said.append) == EngineConfig()
    assert said == [
        "what was tuned (2 x 5000 threads, 3 of the coordinator, 50 spins) does not fit the cores of now: "
        "run `warmfront tune` again"
    ]
