"""What a user can wish for, and what cannot be meant.  pytest tests/shared/test_config.py"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from warmfront.shared.config import (
    ACTIVATIONS,
    DTYPES,
    POLICIES,
    EngineConfig,
    Sampling,
    parse_size,
    parse_slow,
    whole_number,
)
from warmfront.shared.errors import UsageError
from warmfront.shared.selector import SELECTORS


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0", 0),
        ("1b", 1),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        ("1.5GiB", 1_610_612_736),
        ("8G", 8_000_000_000),
        ("8gi", 8 << 30),
        ("2k", 2000),
        ("2KiB", 2048),
        ("3Ti", 3 << 40),
        ("0.25TB", 250_000_000_000),
        (" 7 M ", 7_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "1,5G", "1.G", ".5G", "5PB", "1 0G", "1GBB", "ib", "1i", "٤x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size: write it like 512MB, 1\.5GiB or 8G"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        (None, {}),
        ("", {}),
        ("cpu0:4", {"cpu0": 4.0}),
        ("cpu0:4,cpu12:1.5", {"cpu0": 4.0, "cpu12": 1.5}),
        (" cpu1:1 , cpu0:2.25", {"cpu1": 1.0, "cpu0": 2.25}),
        ("cpu0:2,cpu0:3", {"cpu0": 3.0}),
    ],
)
def test_slow_workers(text: str | None, slow: dict[str, float]) -> None:
    assert parse_slow(text) == slow


@pytest.mark.parametrize(
    "text",
    ["cpu0", "cpu0:", "cpu0:x", "cpu0:0.99", "cpu0:0", "cpu0:-2", "cpu0:1e3", "gpu0:2", "cpu:2", "2", "cpu0:2,", ","],
)
def test_what_slows_nobody_down(text: str) -> None:
    with pytest.raises(UsageError, match=r"slows no worker down: write it like cpu0:4, with a factor of 1 or more$"):
        parse_slow(text)


def test_defaults_leave_everything_open() -> None:
    assert dataclasses.asdict(EngineConfig()) == {
        "dtype": "auto",
        "activation": "auto",
        "selector": "auto",
        "bits": 2,
        "recall": None,
        "max_loss": None,
        "predictor": None,
        "workers": None,
        "threads": None,
        "coordinator_threads": None,
        "spins": None,
        "force": False,
        "pin": True,
        "tuning": True,
        "gpu": "auto",
        "vram_budget": None,
        "policy": "balance",
        "speculate": "off",
        "plan": None,
        "context": None,
        "kv": "auto",
        "parallel": 1,
        "keep": 0.4,
        "core_score": "norm",
        "refresh": 0,
        "measure": False,
        "ram_budget": None,
        "offload_policy": "balance",
        "offload_window": 5,
        "offload_asynchronous": True,
        "offload": None,
        "attention": "auto",
        "look_ahead": False,
        "verify": False,
        "trace": None,
        "slow": None,
    }


@pytest.mark.parametrize(
    "wish",
    [
        *({"dtype": dtype} for dtype in DTYPES),
        *({"selector": selector} for selector in SELECTORS),
        *({"activation": name.replace("T", threshold)} for name in ACTIVATIONS for threshold in ("0.01", "-1", "2e-3")),
        *({"gpu": gpu} for gpu in ("auto", "none", "host", "cuda:0", "cuda:12")),
        *({"policy": policy} for policy in POLICIES),
        {"gpu": "host", "vram_budget": 1, "plan": "a.plan"},
        {"plan": "a.plan"},
        {"verify": True},
        {"slow": "cpu0:4"},
        {"gpu": "none", "vram_budget": None, "plan": None},
        {"context": 1},
        {"bits": 1},
        {"recall": 0.5},
        {"keep": 1.0, "core_score": "positive", "refresh": 8, "max_loss": 0.0},
    ],
)
def test_what_can_be_meant(wish: dict[str, Any]) -> None:
    assert dataclasses.asdict(EngineConfig(**wish)).items() >= wish.items()


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ({"dtype": "int3"}, "no weight type 'int3': use one of auto, f32, f16, bf16, q8, q4"),
        ({"dtype": "F32"}, "no weight type 'F32'"),
        *(
            ({"activation": name}, f"no activation '{name}': use one of auto, silu, relu, ")
            for name in ("", "swish", "fatrelu", "fatrelu:", "fatrelu:T", "fatrelu:nan", "relu:0.1")
        ),
        ({"selector": "some"}, "no selector 'some': use one of auto, all, exact, lowrank, lowbit, core, "),
        ({"keep": 0.0}, "a core that keeps 0.0 of the neurons: it must be above 0, up to 1"),
        ({"core_score": "sum"}, "no score 'sum': use one of norm, positive"),
        ({"refresh": 7}, "a core refreshed every 7 tokens: pass --refresh 8 or more, or 0"),
        ({"bits": 3}, "low-bit copies of 3 bits: use 1, 2 or 4"),
        ({"recall": 1.0}, "a recall of 1.0: it must be at least 0.5 and below 1"),
        ({"max_loss": -0.1}, "a loss of -0.1: it must be 0 or more nats"),
        ({"gpu": "cuda"}, "no GPU 'cuda': use auto, none, host or cuda:N"),
        ({"gpu": "cuda:-1"}, "no GPU 'cuda:-1'"),
        ({"gpu": "cuda:0 "}, "no GPU 'cuda:0 '"),
        ({"gpu": "none", "vram_budget": 0}, "--vram-budget with --gpu none"),
        ({"gpu": "none", "plan": "a.plan"}, "--plan with --gpu none"),
        ({"policy": "by-layer", "plan": "a.plan"}, "--plan with --policy by-layer"),
        ({"spins": -1}, "-1 rounds of spinning: pass --spins 0 to 1000000"),
        ({"spins": 10**7}, "10000000 rounds of spinning"),
        ({"policy": "best"}, f"no policy 'best': use one of {', '.join(POLICIES)}"),
        ({"slow": "gpu0:2"}, "'gpu0:2' slows no worker down"),
        ({"slow": "cpu0:0.5"}, "'cpu0:0.5' slows no worker down"),
        ({"context": 0}, "a context of 0 tokens: pass --ctx 1 or more"),
        ({"context": -5}, "a context of -5 tokens"),
    ],
)
def test_what_cannot_be_meant(wish: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        EngineConfig(**wish)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": 0},
        {"temperature": 1e9},
        {"top_k": 0},
        {"top_k": 10**9},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.5},
        {"seed": 0},
    ],
)
def test_sampling_at_its_bounds(wish: dict[str, Any]) -> None:
    assert dataclasses.asdict(Sampling(**wish)).items() >= wish.items()


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-0.1, INFINITE, NAN)),
        ("top_k", (-1,)),
        ("top_p", (0, -0.1, 1.01, NAN)),
        ("min_p", (-0.01, 1.01, NAN)),
        ("repetition_penalty", (0, -1, 1e-40, 0.0099, 100.1, 1000, INFINITE, NAN)),
        ("seed", (-1,)),
    ],
)
def test_sampling_beyond_its_bounds(field: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{field} is {value}: it must be [^\n]+$"):
            Sampling(**{field: value})


@pytest.mark.parametrize("wishes", [EngineConfig(), Sampling()])
def test_wishes_do_not_change(wishes: EngineConfig | Sampling) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(wishes, dataclasses.fields(wishes)[0].name, 1)


@pytest.mark.parametrize("value", [1, np.int64(7), True])
def test_whole_numbers(value: Any) -> None:
    assert whole_number("a count", value, 1) == int(value)


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "1", None, NAN, [1]])
def test_what_is_not_a_whole_number(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^a count is .+: it must be a whole number, 1 or more$"):
        whole_number("a count", value, 1)
