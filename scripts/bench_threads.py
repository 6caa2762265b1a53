"""Ways to use the same cores, compared: one worker, two, more threads than cores, threads that are not pinned.

    python scripts/bench_threads.py [MODEL] [--rounds 15] [--tokens 64]

All engines are loaded at once and take turns, in an order that rotates. `against` is a way's tok/s divided by that of
one worker in the same round, the median over the rounds; `spread` is the standard deviation of the tok/s divided by
their mean, over all rounds. The last line of stdout is JSON.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from typing import Any

from warmfront.coordinator import Engine
from warmfront.coordinator.models.default_model import DEFAULT_MODEL

PROMPT = [(300 + 7 * i) for i in range(16)]


def ways(cores: int) -> dict[str, dict[str, Any]]:
    """The engine options to compare on a machine of so many cores."""
    return {
        "one worker": {"workers": 1},
        "two workers": {"workers": 2},
        "twice as many threads": {"workers": 1, "threads": 2 * cores, "force": True},
        "twice as many workers": {"workers": 2 * cores, "force": True},
        "not pinned": {"workers": 1, "pin": False},
    }


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with ExitStack() as stack:

        def load(**overrides: Any) -> Engine:
            return stack.enter_context(Engine.load(options.model, tuning=False, **overrides))

        first = load(workers=1)
        engines = {"one worker": first}
        engines |= {name: load(**each) for name, each in ways(len(first.cores.cpus)).items() if name not in engines}
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(-1, options.rounds):
            names = list(engines)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                engines[name].reset()
                engines[name].decode_ids(PROMPT, options.tokens)
                if turn >= 0:  # the first round warms up
                    rates[name].append(engines[name].stats.decode_tps)
    result = {
        name: {
            "tok_s": round(statistics.median(each), 1),
            "against": round(statistics.median(a / b for a, b in zip(each, rates["one worker"], strict=True)), 3),
            "spread": round(statistics.stdev(each) / statistics.fmean(each), 4),
        }
        for name, each in rates.items()
    }
    print(f"{'':24} tok/s   against one worker   spread")
    for name, row in result.items():
        print(f"{name:24} {row['tok_s']:5.1f} {row['against']:20.3f} {row['spread']:8.1%}")
    print(json.dumps({"model": options.model, "rounds": options.rounds, "tokens": options.tokens, "ways": result}))


if __name__ == "__main__":
    main()
