"""What is decided where the user did not, and what is refused.  pytest tests/coordinator/engine/test_resolve.py"""

import pytest

from warmfront.coordinator.engine import resolve
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError


@pytest.mark.parametrize("wish", ["gpu", "cuda", "cuda:x", ""])
def test_unknown_device(wish: str) -> None:
    with pytest.raises(UsageError, match="for attention: use auto, cpu, host or cuda:N"):
        EngineConfig(attention=wish)


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [0]
    monkeypatch.setattr(resolve, "_torch_devices", lambda: (cards[0], "2.0+fake"))
    monkeypatch.setattr(resolve, "against_attention", lambda _index, _say: None)

    def chosen(wish: str, selector: str = "all", gpu: str = "none") -> str:
        config = EngineConfig(attention=wish, gpu=gpu, selector=selector)
        return resolve.resolve_devices(config, print).attention

    assert [chosen(wish) for wish in ("auto", "cpu", "host")] == ["cpu", "cpu", "host"]
    with pytest.raises(UsageError) as refusal:
        chosen("cuda:0")
    assert str(refusal.value) == (
        "--attention cuda:0, but this torch sees no CUDA device: it is 2.0+fake; install one made for CUDA, "
        "or pass --attention cpu"
    )
    cards[0] = 2
    # Where the neurons are; an emulated GPU has none of torch's devices.
    assert [chosen("auto", gpu=gpu) for gpu in ("cuda:1", "host", "none")] == ["cuda:1", "cpu", "cpu"]
    assert chosen("auto", "lowbit", "cuda:0") == "cpu"
    assert chosen("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="torch sees 2 CUDA devices"):
        chosen("cuda:2")
    with pytest.raises(UsageError, match="--selector lowbit predicts on the CPU"):
        chosen("host", "lowbit")
