"""`generate --watch`: which worker computes what, drawn in the terminal with rich, ten times a second.

A line for each layer shows how the bytes of the last token's active neurons were divided over the workers. Below, a
line for each worker shows how much of the pass's time it computed; above are tokens and moves a second, and with a RAM
budget what the cache did since the last drawing. The answer is at the bottom.
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
from warmfront.coordinator.serve.front import Front

__all__ = ["Watch"]

Floats = npt.NDArray[np.float64]
_COLOURS = ("blue", "red", "cyan", "magenta", "green", "yellow")
_MARKS = "#=+*%@"  # of the workers, where there are no colours
_PERIOD_S = 0.1


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
        self._front = Front(engine)
        self._counted = engine.statistics.cache()
        self._cache = ""

    def show(self, text: str) -> None:
        """Take account of a token with this text, and draw if it is time."""
        self._front.note()
        self._text += text
        if time.monotonic() - self._drawn_at >= _PERIOD_S:
            self._front.note_moves()
            self._note_cache()
            self._drawn_at = time.monotonic()
            self._live.update(self._frame(), refresh=True)

    def _note_cache(self) -> None:
        """Describe what the caches did since the last time, if a token has begun since."""
        counted = self._engine.statistics.cache()
        if counted is not None and self._counted is not None and counted.tokens > self._counted.tokens:
            self._cache, self._counted = counted.since(self._counted).described(), counted

    def _frame(self) -> RenderableType:
        ownership, width, front = self._engine.ownership, self._console.width, self._front
        head = Text(
            f"{front.tokens_ps:.1f} tok/s · {front.moves_ps:.0f} moves/s · {ownership.flow.moves} moves, "
            f"{ownership.flow.flips} changes of owner without a copy · policy {self._engine.plan.config.policy}",
            style="bold",
        )
        if self._cache:
            head.append(f"\n{self._cache}", style="not bold")
        table = Table.grid(padding=(0, 1))
        columns = max(10, width - 12)
        assert front.shares is not None
        assert front.busy is not None
        # Where the terminal is too low for all layers, the first ones are shown.
        other_lines = -(-len(head) // width) + len(ownership.names) + 5 + bool(self._cache)
        for layer, shares in enumerate(front.shares[: max(1, self._console.height - other_lines)]):
            table.add_row(f"layer {layer:3}", self._parts(shares, columns))
        for worker, (name, busy) in enumerate(zip(ownership.names, front.busy, strict=True)):
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
        if self._front.shares is not None:
            self._text = ""  # the caller prints it whole
            self._live.update(self._frame(), refresh=True)
        self._live.__exit__(kind, value, traceback)
