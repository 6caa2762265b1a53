"""The same answers with and without speculation, token for token.  pytest tests/integration/test_speculation.py"""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import assert_refused, prepack, run
from warmfront.coordinator.engine import speculation
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.config import Sampling
from warmfront.shared.errors import UsageError

pytestmark = pytest.mark.usefixtures("compiled")

TEXT = "".join(
    f"def {name}(first, second):\n    return first {sign} second\n\n\n"
    for name, sign in (("add", "+"), ("subtract", "-"))
)
# What copies, and what does not.
PROMPTS = [TEXT + "def multiply(first, second):\n", "The lighthouse keeper wrote in his diary that"]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=1.0, top_p=0.9, top_k=40, min_p=0.02, repetition_penalty=1.05, seed=4),
    Sampling(repetition_penalty=1.2),
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is guessed is computed, also if it does not pay."""
    monkeypatch.setattr(speculation, "worth", lambda costs, acceptance, length, most: min(most, 15))


def answers(engine: Engine, **options: Any) -> list[list[tuple[Any, ...]]]:
    """All answers, and how they ended."""
    found = []
    for prompt in PROMPTS:
        for sampling in SAMPLINGS:
            tokens = list(engine.generate(prompt, sampling=sampling, **options))
            found.append([*tokens, (engine.stats.finish_reason, engine.stats.new_tokens)])
    return found


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> dict[str, Any]:
    """Answers of SmolLM2 without speculation."""
    with Engine.load(str(smollm2), speculate="off") as engine:
        return {
            "long": answers(engine, max_new_tokens=40),
            "stopped": answers(engine, max_new_tokens=40, stop=["second)", " sea"], logprobs=2),
            "endless": answers(engine, max_new_tokens=24, ignore_eos=True),
        }


@pytest.mark.parametrize("forced", [False, True])
def test_smollm2(smollm2: Path, plain: dict[str, Any], forced: bool, request: pytest.FixtureRequest) -> None:
    if forced:
        request.getfixturevalue("always")
    with Engine.load(str(smollm2), speculate="ngram") as engine:
        assert answers(engine, max_new_tokens=40) == plain["long"]
        assert answers(engine, max_new_tokens=40, stop=["second)", " sea"], logprobs=2) == plain["stopped"]
        assert answers(engine, max_new_tokens=24, ignore_eos=True) == plain["endless"]
        list(engine.generate(PROMPTS[0], max_new_tokens=60))
        assert 0 < engine.stats.accepted <= engine.stats.drafted


@pytest.mark.parametrize("overrides", [{"hidden_act": "relu"}, {"hidden_act": "relu", "attention_bias": True}], ids=str)
@pytest.mark.usefixtures("always")
def test_to_the_end_of_the_context(tiny_llama: Callable[..., Path], overrides: dict[str, Any]) -> None:
    """A tiny model soon repeats itself; the last guesses end where the context does."""
    model = str(prepack(tiny_llama(**overrides)))
    found, drafted = [], 0
    for speculate in ("off", "ngram"):
        with Engine.load(model, speculate=speculate, context=90, verify=True) as engine:
            for sampling in (Sampling(), Sampling(temperature=0.3, seed=1)):
                found.append([token.id for token in engine.generate([5, 6, 7], sampling=sampling, max_new_tokens=500)])
                assert engine.stats.finish_reason in ("length", "stop")
                drafted += engine.stats.drafted
    assert drafted > 0
    assert found[:2] == found[2:]


@pytest.mark.usefixtures("always")
def test_an_answer_that_is_left_leaves_what_was_said(scripted: Callable[..., Path]) -> None:
    """In the middle of a batch: the cache holds the tokens that came, and no guess."""
    with Engine.load(str(scripted("a", "b", "c")), speculate="ngram") as engine:
        answer = engine.generate("abcabcabc", max_new_tokens=100)
        texts = [next(answer).text for _ in range(8)]
        assert "".join(texts) == "abcabcab"
        assert engine.stats.drafted > engine.stats.accepted > 0
        answer.close()
        assert engine.step(engine.tokenizer.encode("b")[0]).argmax() == engine.tokenizer.encode("c")[0]
        going_on = engine.generate("abcabcabc", max_new_tokens=100)
        next(going_on)
        engine.step(engine.tokenizer.encode("a")[0])
        assert "".join(token.text for token in going_on) == "bca" * 33
        assert "".join(token.text for token in engine.generate("ab", max_new_tokens=4)) == "cabc"


@pytest.mark.usefixtures("always")
def test_ctrl_c(scripted: Callable[..., Path]) -> None:
    """At any moment: the engine goes on, and the next answer is right."""
    with Engine.load(str(scripted("a", "b", "c", context=50_000)), speculate="ngram") as engine:

        def answer() -> None:
            for _ in engine.generate("abcabcabc", max_new_tokens=40_000):
                pass
            time.sleep(2)

        for pause in (0.01, 0.05, 0.083, 0.11):
            killer = threading.Timer(pause, lambda: signal.raise_signal(signal.SIGINT))
            killer.start()
            with pytest.raises(KeyboardInterrupt):
                answer()
            killer.join()
            assert "".join(token.text for token in engine.generate("cab", max_new_tokens=7)) == "cabcabc"


def test_options(tiny_llama: Callable[..., Path]) -> None:
    model = prepack(tiny_llama())
    outcome = run("generate", "-m", model, "-p", "x", "-n", "40", "--speculate=ngram", "--stats", "--json")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert facts["drafted"] >= facts["accepted"] >= 0
    assert f"{facts['accepted']} of {facts['drafted']} guessed tokens came true" in outcome.err
    outcome = run("generate", "-m", model, "-p", "x", "-n", "2", "--stats")
    assert "guessed" not in outcome.err
    assert_refused(run("generate", "-m", model, "-p", "x", "--speculate=magic"), 2, "'magic'", "ngram")
    assert_refused(
        run("generate", "-m", model, "-p", "x", "--speculate=ngram", "--attention=host"), 2, "--attention cpu"
    )
    with pytest.raises(UsageError, match="no speculation 'magic': use one of ngram, off"):
        Engine.load(str(model), speculate="magic")
