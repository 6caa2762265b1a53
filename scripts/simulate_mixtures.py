"""Simulates mixtures of experts on cards that are too small for them: every policy, what PCIe allows, table and plot.

    python scripts/simulate_mixtures.py [--cards rtx3060,rtx4090] [--models ...] [--tokens 2000] [--plot FILE.png]

What `simulate_balancing.py` says of the model of time holds. A model is its published shape, its experts at the bits of
its usual files; attention, head and KV cache are on the card and leave the rest of its memory to experts, each of which
is placed and copied whole. Which experts a token chooses is made up: four topics follow each other, in each of which
another tenth of a layer's experts gets 80 % of the choices, evenly; `--flat` makes all experts alike. `by-layer` is
llama.cpp's --n-cpu-moe, `profile` a static placement by a profile of these topics, `other profile` by one of another
topic, `oracle static` knows the whole trace. `prompt` and `balance, prompts` are told of a prompt before each topic, of
128 tokens that use what its first tokens will use; all others see a topic that changes in the middle of a text.

`fetched` is what PCIe alone would allow: the experts that `balance` does not have on the card are copied there for each
token that uses them, and the CPU computes nothing. The last line of stdout is JSON. Nothing here is measured.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from balancing_simulator.devices import CARDS, PCIE_GBS, Card
from balancing_simulator.replay import simulate
from balancing_simulator.traces import Trace, synthesize_experts

POLICIES = (
    "by-layer",
    "other profile",
    "static",
    "lru",
    "ema-published",
    "ema",
    "prompt",
    "balance",
    "balance, prompts",
    "oracle static",
)
RESERVED = 1.0e9  # bytes of the card: display, CUDA, buffers
NAMES = {"static": "profile"}


class Mixture(NamedTuple):
    """The shape of a published model."""

    layers: int
    experts: int
    used: int
    expert_bytes: int
    attention_bytes: int  # of all layers and the head
    kv_bytes: int  # of 4,096 tokens


def mixture(
    layers: int, hidden: int, ffn: int, experts: int, used: int, heads: tuple[int, int, int], vocab: int, bits: float
) -> Mixture:
    """`heads`: of queries, of keys, channels of one; `bits` of a weight of experts, 8.5 for all others."""
    queries, keys, channels = heads
    attention = layers * 2 * hidden * (queries + keys) * channels + hidden * vocab
    return Mixture(
        layers,
        experts,
        used,
        int(3 * hidden * ffn * bits / 8),
        int(attention * 8.5 / 8),
        4096 * layers * 2 * keys * channels * 2,
    )


MODELS = {
    "Qwen3-30B-A3B, 4.5 bits": mixture(48, 2048, 768, 128, 8, (32, 4, 128), 151_936, 4.5),
    "Qwen3-30B-A3B, 8.5 bits": mixture(48, 2048, 768, 128, 8, (32, 4, 128), 151_936, 8.5),
    "gpt-oss-120b, 4.25 bits": mixture(36, 2880, 2880, 128, 4, (64, 8, 64), 201_088, 4.25),
}


def simulated(model: Mixture, card: Card, trace: Trace) -> dict[str, Any]:
    """Tokens a second by policy, and what goes with them."""
    device = card.machine(model.attention_bytes)
    free = 1e9 * card.memory_gb - RESERVED - model.attention_bytes - model.kv_bytes
    share = min(1.0, max(0.0, free / (model.layers * model.experts * model.expert_bytes)))
    figures: dict[str, Any] = {"held": round(share, 3), "tok_s": {}}
    for name in POLICIES:
        told = name == "balance, prompts" or None
        result = simulate("balance" if told else name, trace, device, share, prompts=told)
        figures["tok_s"][NAMES.get(name, name)] = round(len(result.seconds) / sum(result.seconds), 1)
        if name == "balance":
            figures |= {"hit_share": round(float(np.mean(result.hits)), 3), "moves": result.moves}
            figures["unused"] = round(result.unused / max(1, result.moves), 3)
            missed = (1 - float(np.mean(result.hits))) * model.layers * model.used * model.expert_bytes
    cpu = simulate("static", trace, device, 0.0)
    figures["tok_s"]["CPU alone"] = round(len(cpu.seconds) / sum(cpu.seconds), 1)
    used_ns = model.layers * (device.gpu[0] + device.gpu[1] * model.used * model.expert_bytes)
    for pcie, gbs in PCIE_GBS.items():
        others = simulate("balance", trace, card.machine(model.attention_bytes, pcie), share)
        figures[f"pcie{pcie}"] = {
            "balance": round(len(others.seconds) / sum(others.seconds), 1),
            "fetched": round(1e9 / (device.coordinator_ns + used_ns + missed / gbs), 1),
        }
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    names = list(rows[0]["tok_s"])
    lines = [
        f"| model | card | held | {' | '.join(names)} | hits | copies | unused |",
        f"|{'---|' * (len(names) + 6)}",
    ]
    for row in rows:
        speeds = " | ".join(str(row["tok_s"][name]) for name in names)
        tail = f"{row['hit_share']:.0%} | {row['moves']} | {row['unused']:.0%}"
        lines.append(f"| {row['model']} | {row['card']} | {row['held']:.0%} | {speeds} | {tail} |")
    links = [f"pcie{pcie}" for pcie in PCIE_GBS]
    lines += [
        "",
        f"| model | card | {' | '.join(f'{link}: balance, fetched' for link in links)} |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        both = " | ".join(f"{row[link]['balance']}, {row[link]['fetched']}" for link in links)
        lines.append(f"| {row['model']} | {row['card']} | {both} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A bar for each policy, a panel for each model and card."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(rows), 4.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        names, speeds = list(row["tok_s"]), list(row["tok_s"].values())
        bars = axes.barh(
            names[::-1], speeds[::-1], color=["#d1495b" if n == "balance" else "#8d99ae" for n in names[::-1]]
        )
        axes.bar_label(bars, padding=2, fontsize=8)
        axes.set(title=f"{row['model']}\n{row['card']}: {row['held']:.0%} of the experts fit", xlabel="tokens a second")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.suptitle(
        "simulated, not measured: four topics, a tenth of the experts gets 80 % of the choices", fontsize=10
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", default="rtx3060,rtx4090", help=f"of {', '.join(CARDS)}; default: %(default)s")
    parser.add_argument("--models", default=";".join(MODELS), help="separated by ';'; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--flat", action="store_true", help="all experts are chosen equally often")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    if options.tokens < 1:
        parser.error("--tokens must be 1 or more")
    cards, models = options.cards.split(","), options.models.split(";")
    for name, known in [*((card, CARDS) for card in cards), *((model, MODELS) for model in models)]:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    rows = []
    for name in models:
        model = MODELS[name]
        trace = synthesize_experts(
            tokens=options.tokens,
            layers=model.layers,
            experts=model.experts,
            used=model.used,
            expert_bytes=model.expert_bytes,
            share=(model.experts // 10) / model.experts if options.flat else 0.8,
        )
        rows += [{"model": name, "card": card, **simulated(model, CARDS[card], trace)} for card in cards]
    print(table(rows))
    if options.plot is not None:
        draw(options.plot, rows)
    print(json.dumps({"simulated": True, "tokens": options.tokens, "flat": options.flat, "runs": rows}))


if __name__ == "__main__":
    main()
