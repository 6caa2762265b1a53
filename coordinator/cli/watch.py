"""`generate --watch`: which worker computes what, drawn in the terminal with rich, ten times a second.

A line for each layer shows how the bytes of the last token's active neurons were divided over the workers. Below, a
line for each worker shows how much of the pass's time it computed; above are tokens and moves a second. The answer
is at the bottom.
"""

import time
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from warmfront.coordinator.engine.engine import Engine

__all__ = ["Watch"]

Floats = npt.NDArray[np.float64]
_COLOURS = ("blue", "red", "cyan", "magenta", "green", "yellow")
_MARKS = "#=+*%@"  # of the workers, where there are no colours
_PERIOD_S = 0.1
_NEW = 0.2  # weight of a new token in the moving averages that are shown


class Watch:
    """Draws while its with block lasts; `show` is to be called for every token."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._console = Console(stderr=True)
        colours = self._console.color_system is not None and not self._console.no_color
        drawn = colours and self._console.encoding.startswith("utf")
        self._marks, self._rest = ("█", "░") if drawn else (_MARKS, ".")
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._text, self._drawn_at = "", 0.0
        self._token_at, self._moves_at, self._moves = time.monotonic(), time.monotonic(), 0
        self._token_s, self._moves_ps = 0.0, 0.0
        self._shares: Floats | None = None
        self._busy: Floats | None = None

    def show(self, text: str) -> None:
        """Take account of a token with this text, and draw if it is time."""
        engine, now = self._engine, time.monotonic()
        token_s, self._token_at = now - self._token_at, now
        loads = engine.ownership.layer_loads()
        shares = loads / np.maximum(loads.sum(1, keepdims=True), 1)
        steps, spans = engine.statistics.times()
        # Of the pass, which may have made several tokens.
        busy = (spans[:, :, 1] - spans[:, :, 0]).sum(0) / max(1, int(steps[-1, -1] - steps[0, 0]))
        if self._shares is None or self._busy is None:
            self._token_s, self._shares, self._busy = token_s, shares, busy
        self._token_s += _NEW * (token_s - self._token_s)
        self._shares += _NEW * (shares - self._shares)
        self._busy += _NEW * (busy - self._busy)
        self._text += text
        if now - self._drawn_at >= _PERIOD_S:
            moves = engine.ownership.flow.moves
            self._moves_ps += 0.5 * ((moves - self._moves) / (now - self._drawn_at) - self._moves_ps)
            self._moves, self._drawn_at = moves, now
            self._live.update(self._frame(), refresh=True)

    def _frame(self) -> RenderableType:
        ownership, width = self._engine.ownership, self._console.width
        head = Text(
            f"{1 / max(self._token_s, 1e-9):.1f} tok/s · {self._moves_ps:.0f} moves/s · {ownership.flow.moves} moves, "
            f"{ownership.flow.flips} changes of owner without a copy · policy {self._engine.plan.config.policy}",
            style="bold",
        )
        table = Table.grid(padding=(0, 1))
        columns = max(10, width - 12)
        assert self._shares is not None
        assert self._busy is not None
        # Where the terminal is too low for all layers, the first ones are shown.
        other_lines = -(-len(head) // width) + len(ownership.names) + 5
        for layer, shares in enumerate(self._shares[: max(1, self._console.height - other_lines)]):
            table.add_row(f"layer {layer:3}", self._parts(shares, columns))
        for worker, (name, busy) in enumerate(zip(ownership.names, self._busy, strict=True)):
            filled = round(min(1.0, busy) * columns)
            bar = self._bar(worker, filled) + Text(self._rest * (columns - filled), style="dim")
            table.add_row(f"{name} {min(busy, 1):4.0%}", bar)
        tail = self._text[-2 * width :]
        return Group(head, table, Text(tail))

    def _bar(self, worker: int, length: int) -> Text:
        return Text(self._marks[worker % len(self._marks)] * length, style=_COLOURS[worker % len(_COLOURS)])

    def _parts(self, shares: Floats, columns: int) -> Text:
        line, at, end = Text(), 0, 0.0
        for worker, share in enumerate(shares):
            end += share
            upto = round(end * columns)
            line += self._bar(worker, upto - at)
            at = upto
        return line

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shares is not None:
            self._text = ""  # the caller prints it whole
            self._live.update(self._frame(), refresh=True)
        self._live.__exit__(kind, value, traceback)
