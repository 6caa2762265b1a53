"""What more sockets would gain: tok/s of 1 to 8 of them, from the bytes of a token and what handing over costs.

    python scripts/simulate_scaling.py [--shape 7b|13b|70b] [--active 0.1] [--handoff BENCH.json] [--plot FILE.png]

A layer on k sockets takes

    (attention + feed-forward bytes) / (k * bandwidth)      all weights are sliced over the sockets' memory
    + barriers * barrier(k) + hand-over(k)                  threads wait for each other, workers for the coordinator
    + merge(k)                                              every thread adds up k partial sums of the hidden size
    + rest                                                  norms and the like, which every thread repeats

A barrier is a counter that all threads increment in turn: its cache line goes from core to core, near or far. `flat` is
one counter for all; `tree` one for each socket and one above them. The coordinator's threads span all sockets; `apart`
keeps them on one, whose bandwidth is then all that attention has.

Latencies and bandwidth are those of a two-socket server of today unless given: 300 GB/s a socket, 32 cores, 60 ns
between cores of a socket, 200 ns between sockets. `--handoff` takes the near latency from the last line of
bench_handoff.py, measured here. The last line of stdout is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

SOCKETS = range(1, 9)
BARRIERS = 4  # of a layer: q, k, v; attention; output; predictor


class Shape(NamedTuple):
    """The sizes of a model."""

    layers: int
    hidden: int
    ffn: int
    kv_hidden: int
    vocab: int


SHAPES = {
    "7b": Shape(32, 4096, 11008, 4096, 32000),
    "13b": Shape(40, 5120, 13824, 5120, 32000),
    "70b": Shape(80, 8192, 28672, 1024, 32000),
}


class Server(NamedTuple):
    """A machine of equal sockets."""

    cores: int  # of a socket
    gb_s: float  # read bandwidth of a socket
    near_ns: float  # a cache line from core to core within a socket
    far_ns: float  # and between sockets
    rest_ns: float  # of a layer: what every thread repeats

    def barrier(self, sockets: int, tree: bool) -> float:
        """ns of a barrier of all threads of `sockets`, which arrive together, to the last departure."""
        threads = self.cores * sockets
        if sockets == 1:
            return threads * self.near_ns + self.near_ns
        if tree:
            return self.cores * self.near_ns + sockets * self.far_ns + self.far_ns + self.near_ns
        far = 1 - 1 / sockets  # of the arrivals follow one from another socket
        return threads * (far * self.far_ns + (1 - far) * self.near_ns) + self.far_ns

    def hand_over(self, sockets: int, tree: bool) -> float:
        """ns for a job to reach the workers, for their own barrier at its end, and for the answers to come back."""
        way = self.near_ns if sockets == 1 else self.far_ns
        return 2 * way + self.barrier(1, tree) + sockets * way

    def merge(self, sockets: int, hidden: int) -> float:
        """ns to read the partial sums, all but one from other sockets, with 8 lines in flight at a time."""
        lines = 4 * hidden / 64
        return lines * (self.near_ns + (sockets - 1) * self.far_ns) / 8


def token(
    shape: Shape, server: Server, sockets: int, *, weight: float, active: float, tree: bool, apart: bool
) -> dict[str, float]:
    """ns of a token by part; `weight`: bytes of a weight; `active`: share of the neurons; ways as in `table`."""
    attention = (2 * shape.hidden**2 + 2 * shape.hidden * shape.kv_hidden) * weight
    neurons = 3 * shape.hidden * shape.ffn * weight * active
    head = shape.hidden * shape.vocab * weight
    team = 1 if apart else sockets
    parts = {
        "attention": (shape.layers * attention + head) / (team * server.gb_s),
        "feed_forward": shape.layers * neurons / (sockets * server.gb_s),
        "barriers": shape.layers * BARRIERS * server.barrier(team, tree),
        "hand_over": shape.layers * server.hand_over(sockets, tree),
        "merge": shape.layers * server.merge(sockets, shape.hidden),
        "rest": shape.layers * server.rest_ns,
    }
    return parts | {"total": sum(parts.values())}


def table(shape: Shape, server: Server, weight: float, active: float) -> list[dict[str, Any]]:
    """A row for each number of sockets and way of waiting: `flat`, `tree`, `apart`, as above."""
    rows = []
    for name, tree, apart in (("flat", False, False), ("tree", True, False), ("apart", True, True)):
        how = {"weight": weight, "active": active, "tree": tree, "apart": apart}
        first = token(shape, server, 1, **how)["total"]
        for sockets in SOCKETS:
            parts = token(shape, server, sockets, **how)
            waits = parts["barriers"] + parts["hand_over"] + parts["merge"] + parts["rest"]
            rows.append(
                {
                    "way": name,
                    "sockets": sockets,
                    "tok_s": 1e9 / parts["total"],
                    "speedup": first / parts["total"],
                    "waits": waits / parts["total"],
                    "us": {part: ns / 1e3 for part, ns in parts.items()},
                }
            )
    return rows


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """tok/s over sockets, a line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for way in dict.fromkeys(row["way"] for row in rows):
        panel.plot(SOCKETS, [row["tok_s"] for row in rows if row["way"] == way], "o-", label=way)
    panel.set(xlabel="sockets", ylabel="tok/s, simulated", title=title)
    panel.set_ylim(bottom=0)
    panel.legend()
    figure.savefig(path, format="png", dpi=130)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="13b")
    parser.add_argument("--weight-bytes", type=float, default=2.0, help="of a weight; default: f16")
    parser.add_argument("--active", type=float, default=0.1, help="share of the neurons that a token needs")
    parser.add_argument("--cores", type=int, default=32, help="of a socket")
    parser.add_argument("--gb-s", type=float, default=300.0, help="read bandwidth of a socket")
    parser.add_argument("--near-ns", type=float, default=60.0, help="a cache line's way within a socket")
    parser.add_argument("--far-ns", type=float, default=200.0, help="and between sockets")
    parser.add_argument("--rest-us", type=float, default=4.0, help="of a layer: what every thread repeats")
    parser.add_argument("--handoff", type=Path, help="output of bench_handoff.py: the near latency measured here")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if (
        min(options.weight_bytes, options.cores, options.gb_s, options.near_ns, options.far_ns) <= 0
        or not 0 < options.active <= 1
    ):
        parser.error("sizes, speeds and latencies must be above 0, --active up to 1")
    try:
        near = near_of(options.handoff) if options.handoff is not None else options.near_ns
    except (OSError, ValueError, LookupError) as error:
        parser.error(f"--handoff {options.handoff} is not output of bench_handoff.py: {error}")
    server = Server(options.cores, options.gb_s, near, options.far_ns, 1e3 * options.rest_us)
    rows = table(SHAPES[options.shape], server, options.weight_bytes, options.active)
    print("way    sockets    tok/s  speedup  waits   attention  feed-forward  barriers  hand-over  merge   us a token")
    for row in rows:
        us = row["us"]
        print(
            f"{row['way']:<6} {row['sockets']:7} {row['tok_s']:8.1f} {row['speedup']:8.2f} {row['waits']:6.0%} "
            f"{us['attention']:11.0f} {us['feed_forward']:13.0f} {us['barriers']:9.0f} {us['hand_over']:10.0f} "
            f"{us['merge']:6.0f}"
        )
    for way in ("flat", "tree", "apart"):
        best = max((row for row in rows if row["way"] == way), key=lambda row: row["tok_s"])
        print(f"{way}: most tok/s with {best['sockets']} sockets, {best['speedup']:.2f} times one")
    if options.plot is not None:
        draw(rows, f"{options.shape}, {options.active:.0%} active", options.plot)
    print(json.dumps({"shape": options.shape, "active": options.active, "server": server._asdict(), "rows": rows}))


def near_of(path: Path) -> float:
    """ns of one way between two cores: half a round trip."""
    return 500 * float(json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["round_trip_two_cores_us"])


if __name__ == "__main__":
    main()
