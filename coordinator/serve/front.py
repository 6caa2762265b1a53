"""What moves while tokens are made, as figures: which worker computes what, shares, moves, rates.

`generate --watch` draws them in a terminal, the page in a browser, and /metrics counts them.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.batching.async_engine import AsyncEngine
from warmfront.coordinator.engine.engine import Engine

__all__ = ["Front", "Live"]

Floats = npt.NDArray[np.float64]
_IDLE_S = 2.0
_PERIOD_S = 0.1
_MEMORY_S = 2.0  # the kernel takes milliseconds to tell
_NEW = 0.2  # weight of a new pass in the moving averages


class Front:
    """Follows one engine; `note` is to be called on its thread, behind each pass or now and then."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._noted_at = self._moves_at = time.monotonic()
        self._moves = 0
        self.token_s = self.moves_ps = 0.0
        # [layers, workers]: shares of the bytes that a layer's active neurons are; [workers]: of a pass's time.
        self.shares: Floats | None = None
        self.busy: Floats | None = None

    def begin(self) -> None:
        """What was before now is not a part of the next pass."""
        self._noted_at = time.monotonic()

    def note(self, tokens: int = 1) -> None:
        """Another pass has given this many tokens."""
        engine, now = self._engine, time.monotonic()
        token_s, self._noted_at = (now - self._noted_at) / max(1, tokens), now
        loads = engine.ownership.layer_loads()
        shares = loads / np.maximum(loads.sum(1, keepdims=True), 1)
        steps, spans = engine.statistics.times()
        # Of the pass, which may have made several tokens.
        busy = (spans[:, :, 1] - spans[:, :, 0]).sum(0) / max(1, int(steps[-1, -1] - steps[0, 0]))
        if self.shares is None or self.busy is None:
            self.token_s, self.shares, self.busy = token_s, shares, busy
        self.token_s += _NEW * (token_s - self.token_s)
        self.shares += _NEW * (shares - self.shares)
        self.busy += _NEW * (busy - self.busy)

    def note_moves(self) -> None:
        """Bring the rate of moves up to date; to be called several times a second."""
        now, moves = time.monotonic(), self._engine.ownership.flow.moves
        self.moves_ps += 0.5 * ((moves - self._moves) / max(now - self._moves_at, 1e-3) - self.moves_ps)
        self._moves, self._moves_at = moves, now

    @property
    def tokens_ps(self) -> float:
        """Tokens a second."""
        return 1 / max(self.token_s, 1e-9)

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        ownership = self._engine.ownership
        owned = np.bincount(ownership.owners().ravel(), minlength=len(ownership.names))
        return {
            "workers": list(ownership.names),
            "shares": [] if self.shares is None else np.round(self.shares, 3).tolist(),
            "busy": [] if self.busy is None else np.round(np.clip(self.busy, 0, 1), 3).tolist(),
            "groups": owned[: len(ownership.names)].tolist(),
            "tokens_ps": round(self.tokens_ps, 1) if self.token_s else 0.0,
            "moves_ps": round(self.moves_ps, 1),
            "moves": ownership.flow.moves,
            "flips": ownership.flow.flips,
            "unused": ownership.flow.unused,
            "policy": self._engine.plan.config.policy,
        }


class Live:
    """Follows the front for pages; without one nothing is computed."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine, self._front = engine, Front(engine.engine)
        self.pages = 0
        self._tokens, self._noted_at, self._passed_at = 0, 0.0, 0.0
        self._memory, self._measured_at = 0, 0.0

    def note(self, tokens: int) -> None:
        """On the engine's thread: a pass has given this many tokens."""
        idle, self._passed_at = time.monotonic() - self._passed_at, time.monotonic()
        if idle > _IDLE_S:  # it was waiting for a request, which is no part of a pass
            self._front.begin()
            self._tokens = 0
            return
        self._tokens += tokens
        if self.pages and time.monotonic() - self._noted_at >= _PERIOD_S / 2:
            self._front.note(self._tokens)
            self._tokens, self._noted_at = 0, time.monotonic()

    async def figures(self) -> dict[str, Any]:
        """What the page draws."""
        if time.monotonic() - self._measured_at > _MEMORY_S:
            pids: list[int | str] = ["self", *(worker.pid for worker in self._engine.engine.statistics.workers())]
            self._memory = await asyncio.to_thread(lambda: sum(map(_memory, pids)))
            self._measured_at = time.monotonic()
        self._front.note_moves()
        figures = self._front.figures()
        running, waiting = self._engine.running, self._engine.waiting
        if not running:
            figures |= {"tokens_ps": 0.0, "busy": [0.0] * len(figures["busy"])}
        return figures | {"running": running, "waiting": waiting, "memory": self._memory}


def _memory(pid: int | str) -> int:
    """Bytes that a process holds, its part of what it shares with others."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended, or the kernel does not tell
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
