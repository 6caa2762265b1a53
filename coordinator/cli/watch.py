"""`generate --watch`: the warm front as it moves, drawn in the terminal with rich, ten times a second.

One line for each layer: how the bytes of the last token's active neurons were divided over the workers, by width.
Below, for each worker, how much of the token's time it computed; above, tokens and moves a second. The answer runs
beneath.
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
# The workers' marks where there are no colours.
_MARKS = "#=+*%@"
_PERIOD_S = 0.1
# Part of what is shown that a new token makes.
_NEW = 0.2


class Watch:
    """Draws while the block lasts; `show` it every token."""

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
        """A token has come, with this text."""
        engine, now = self._engine, time.monotonic()
        token_s, self._token_at = now - self._token_at, now
        loads = engine.ownership.layer_loads()
        shares = loads / np.maximum(loads.sum(1, keepdims=True), 1)
        _, spans = engine.statistics.times()
        busy = (spans[:, :, 1] - spans[:, :, 0]).sum(0) / 1e9 / max(token_s, 1e-9)
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
        front, width = self._engine.ownership, self._console.width
        head = Text(
            f"{1 / max(self._token_s, 1e-9):.1f} tok/s · {self._moves_ps:.0f} moves/s · {front.flow.moves} moves, "
            f"{front.flow.flips} changes of owner without a copy · policy {self._engine.plan.config.policy}",
            style="bold",
        )
        table = Table.grid(padding=(0, 1))
        room = max(10, width - 12)
        assert self._shares is not None
        assert self._busy is not None
        # The lowest layers where the terminal has no room for all.
        rest = -(-len(head) // width) + len(front.names) + 5
        for layer, shares in enumerate(self._shares[: max(1, self._console.height - rest)]):
            table.add_row(f"layer {layer:3}", self._parts(shares, room))
        for worker, (name, busy) in enumerate(zip(front.names, self._busy, strict=True)):
            filled = round(min(1.0, busy) * room)
            bar = self._bar(worker, filled) + Text(self._rest * (room - filled), style="dim")
            table.add_row(f"{name} {min(busy, 1):4.0%}", bar)
        tail = self._text[-2 * width :]
        return Group(head, table, Text(tail))

    def _bar(self, worker: int, length: int) -> Text:
        return Text(self._marks[worker % len(self._marks)] * length, style=_COLOURS[worker % len(_COLOURS)])

    def _parts(self, shares: Floats, room: int) -> Text:
        line, at, end = Text(), 0, 0.0
        for worker, share in enumerate(shares):
            end += share
            upto = round(end * room)
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
            self._text = ""  # it is printed whole
            self._live.update(self._frame(), refresh=True)
        self._live.__exit__(kind, value, traceback)
