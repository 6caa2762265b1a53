"""How well the selector `lowbit` finds the neurons that fire, on text that its thresholds were not calibrated on.

Recall by mass is the part that the selected neurons have in the sum of |h_i| * ||down_i|| over all that fire; the cost
is how many neurons are selected for each that fires. The model writes the text itself, greedily, from random tokens.
The last line of stdout is JSON.

    python scripts/evaluate_lowbit.py MODEL [--bits 1,2,4] [--recall 0.995] [--tokens 192] [--dtype auto]
"""

import argparse
import json
from typing import Any

import numpy as np

from warmfront.coordinator import Engine
from warmfront.coordinator.selectors.calibration import masses_and_scores

STARTS = 4


def evaluate(engine: Engine, tokens: int) -> dict[str, float]:
    """Means over the layers, and the worst layer's recall."""
    ids: list[int] = []
    for start in np.random.default_rng(7).integers(engine.model.spec.vocab, size=STARTS):
        engine.reset()
        ids += [int(start), *engine.decode_ids([int(start)], tokens // STARTS - 1)]
    inputs = engine.session.feed_forward_inputs(ids)
    lowbit = engine.session.runtime.lowbit
    assert lowbit is not None
    recalls, excesses = [], []
    for layer, x in enumerate(inputs):
        mass, scores, _ = masses_and_scores(lowbit, engine.model, layer, x)
        selected = scores > lowbit.thresholds[layer]
        recalls.append(mass[selected].sum(dtype=np.float64) / mass.sum(dtype=np.float64))
        excesses.append(np.count_nonzero(selected) / np.count_nonzero(mass))
    return {
        "recall_by_mass": round(float(np.mean(recalls)), 4),
        "worst_layer": round(float(np.min(recalls)), 4),
        "selected_per_fired": round(float(np.mean(excesses)), 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", default="1,2,4")
    parser.add_argument("--recall", type=float, default=0.995)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    result: dict[str, Any] = {"model": options.model, "recall": options.recall}
    for bits in map(int, options.bits.split(",")):
        with Engine.load(
            options.model, selector="lowbit", bits=bits, recall=options.recall, dtype=options.dtype, say=print
        ) as engine:
            result[f"{bits} bits"] = evaluate(engine, options.tokens)
        print(f"{bits} bits: {result[f'{bits} bits']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
