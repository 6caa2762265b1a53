"""Packed models written again in another order of neurons.  pytest tests/coordinator/profile/test_reorder.py"""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.profile.counts import Profile
from warmfront.coordinator.profile.ordering import order_groups, order_neurons
from warmfront.coordinator.profile.reorder import reorder
from warmfront.shared.errors import ResourceError
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.store import PackedModel

Make = Callable[..., Path]
# 80 neurons: two groups and a half.
FFN, NEURONS, LAYERS = 80, 96, 2


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed models in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "warmfront" / "models"


def pack(path: Path, dtype: str = "auto") -> Path:
    return ensure_packed(path, dtype, lambda line: None, lambda done, total: None)


@pytest.fixture
def packed(tiny_llama: Make) -> Path:
    return pack(tiny_llama(hidden_act="relu", intermediate_size=FFN))


@pytest.fixture
def predicting(tiny_llama: Make, tmp_path: Path) -> Path:
    """A packed model with predictors."""
    from safetensors.numpy import save_file

    folder = shutil.copytree(tiny_llama(hidden_act="relu", intermediate_size=FFN), tmp_path / "predicting")
    rng = np.random.default_rng(0)
    shapes = {"fc1": (32, 64), "fc2": (FFN, 32)}
    rows = {
        f"layers.{i}.{part}.weight": rng.normal(size=shape).astype(np.float32)
        for i in range(LAYERS)
        for part, shape in shapes.items()
    }
    save_file(rows, folder / "predictor.safetensors")
    return pack(folder)


def profile_of(layers: int, neurons: int, ffn: int, *, seed: int = 0, tokens: int = 200) -> Profile:
    """Random firing, at rates of the neurons' own."""
    rng = np.random.default_rng(seed)
    profile = Profile(layers, neurons, ffn, "relu", ["text"])
    profile.add(rng.random((layers, tokens, neurons)) < rng.random((layers, 1, neurons)) * (np.arange(neurons) < ffn))
    return profile


def rewrite(path: Path, profile: Profile, order: str = "") -> bool:
    return reorder(path, profile, order, lambda line: None, lambda done, total: None)


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Everything in the file but its sums, read by the safetensors library."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in set(file.keys()) - {"sums"}}, file.metadata()


def test_rows_of_neurons_move_and_nothing_else(predicting: Path) -> None:
    before, metadata = contents(predicting)
    profile = profile_of(LAYERS, NEURONS, FFN)
    assert rewrite(predicting, profile)
    after, changed = contents(predicting)
    assert set(after) == {*before, "profile", "places"}
    places = after.pop("places")
    assert changed.pop("order")
    assert json.loads(changed.pop("profile")) == {"activation": "relu", "tokens": profile.tokens, "texts": ["text"]}
    assert {name: json.loads(text) for name, text in changed.items() if name != "format"} == {
        name: json.loads(text) for name, text in metadata.items() if name != "format"
    }
    for layer, counts in enumerate(profile.counts):
        order = order_neurons(counts, FFN)
        assert (order != np.arange(NEURONS)).any()
        np.testing.assert_array_equal(places[layer], order)
        np.testing.assert_array_equal(after["profile"][layer], counts[:, order])
        for role, rows in (("ffn", 96), ("fc2", 96)):
            name = f"layers.{layer}.{role}"
            np.testing.assert_array_equal(
                after.pop(name).reshape(rows, -1), before.pop(name).reshape(rows, -1)[order], name
            )
    after.pop("profile")
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name], name)


def test_the_profile_is_read_back_in_the_new_order(packed: Path) -> None:
    profile = profile_of(LAYERS, NEURONS, FFN)
    with PackedModel(packed) as model:
        assert Profile.of(model) is None
        assert (model.order, model.profile) == ("", {})
    rewrite(packed, profile)
    with PackedModel(packed) as model:
        again = Profile.of(model)
        assert model.spec.ffn == FFN
    assert again is not None
    assert (again.tokens, again.texts, again.ffn) == (profile.tokens, ["text"], FFN)
    np.testing.assert_array_equal(np.sort(again.rates(), axis=1), np.sort(profile.rates(), axis=1))
    firing = again.group_firing()
    assert (np.diff(firing[:, :2], axis=1) <= 0).all(), "the hottest group first"


@pytest.mark.parametrize("dtype", ["f16", "q8", "q4"])
def test_every_weight_type(tiny_llama: Make, dtype: str) -> None:
    path = pack(tiny_llama(hidden_act="relu", intermediate_size=FFN), dtype)
    before, _ = contents(path)
    profile = profile_of(LAYERS, NEURONS, FFN)
    rewrite(path, profile)
    after, _ = contents(path)
    bundles = [tensors["layers.1.ffn"].reshape(NEURONS, -1) for tensors in (before, after)]
    np.testing.assert_array_equal(bundles[1], bundles[0][order_neurons(profile.counts[1], FFN)])


def test_groups_that_share_scales_move_whole(tiny_gguf: Make) -> None:
    path = pack(tiny_gguf(kind="Q4_0", architecture="llama"))
    with PackedModel(path) as model:
        assert model.layout.down_kind == Kind.Q4C
    before, _ = contents(path)
    profile = profile_of(1, 512, 512)
    assert rewrite(path, profile)
    after, _ = contents(path)
    order = order_groups(profile.counts[0], 512)[::32] // 32
    np.testing.assert_array_equal(after["layers.0.ffn"], before["layers.0.ffn"][order])
    with PackedModel(path) as model:
        assert Profile.of(model) is None, "what fires with ReLU says nothing of SiLU"
        model.activate("relu")
        firing = Profile.of(model).group_firing()  # type: ignore[union-attr]
    assert (np.diff(firing) <= 0).all()


def test_the_order_has_a_name_of_its_own(packed: Path) -> None:
    """It changes with each reordering, and only then; the counts of another order are refused."""
    rewrite(packed, profile_of(LAYERS, NEURONS, FFN))
    with PackedModel(packed) as model:
        first, counted = model.order, Profile.of(model)
    assert counted is not None
    assert rewrite(packed, profile_of(LAYERS, NEURONS, FFN, seed=1), first)
    with PackedModel(packed) as model:
        second, counted = model.order, Profile.of(model)
    assert second not in ("", first)
    assert counted is not None
    assert not rewrite(packed, counted, second), "it is in that order"
    with PackedModel(packed) as model:
        assert model.order == second
    with pytest.raises(ResourceError, match=r"^another warmfront has reordered [^\n]+: start again$"):
        rewrite(packed, profile_of(LAYERS, NEURONS, FFN), first)


def test_who_has_the_file_open_keeps_it(packed: Path) -> None:
    with PackedModel(packed) as model:
        before = model.bytes_of("layers.0.ffn")
        rewrite(packed, profile_of(LAYERS, NEURONS, FFN))
        np.testing.assert_array_equal(model.bytes_of("layers.0.ffn"), before)


def test_what_was_made_from_the_old_order_goes(packed: Path, models: Path) -> None:
    names = ("lowbit2.safetensors", "lowbit2.0.995-relu.npz", "lowbit4-abc.safetensors", "down.npz", "core-1f-abc.npz")
    mine = [models / f"{packed.stem}-{name}" for name in names]
    others = models / "another-lowbit2.safetensors"
    for file in (*mine, others):
        file.write_bytes(b"rows")
    rewrite(packed, profile_of(LAYERS, NEURONS, FFN))
    assert sorted(models.iterdir()) == sorted([packed, others])


@pytest.fixture
def no_room() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room(packed: Path, models: Path, request: pytest.FixtureRequest) -> None:
    before = packed.read_bytes()
    lowbit = models / f"{packed.stem}-lowbit2.safetensors"
    lowbit.write_bytes(b"rows")
    request.getfixturevalue("no_room")
    with pytest.raises(ResourceError) as caught:
        rewrite(packed, profile_of(LAYERS, NEURONS, FFN))
    what_to_do = "make room for a second copy of it"
    assert str(caught.value) == f"cannot write the reordered model to {models}: File too large; {what_to_do}"
    assert sorted(models.iterdir()) == sorted([packed, lowbit])
    assert packed.read_bytes() == before


def test_progress(packed: Path) -> None:
    seen: list[Any] = []
    reorder(packed, profile_of(LAYERS, NEURONS, FFN), "", print, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (packed.stat().st_size, packed.stat().st_size)
    assert seen == sorted(seen)
