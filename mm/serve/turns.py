"""Whose request begins next. Belongs to the event loop.

Requests that came together would go through their stages side by side, so that each has its answer when all have
theirs, and whoever comes meanwhile waits as long. Begun one after the other, they take no longer, and a newcomer waits
for those of its own line alone.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """`await turns.mine(line)` returns when it is this request's turn: in each turn of the event loop one request
    begins, of each line one after the other."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        self._going = False

    async def mine(self, line: str) -> None:
        loop = asyncio.get_running_loop()
        if not self._going:
            self._going = True
            loop.call_soon(self._next)
            return
        turn = loop.create_future()
        self._lines.setdefault(line, deque()).append(turn)
        await turn

    def _next(self) -> None:
        while self._lines:
            line, waiting = next(iter(self._lines.items()))
            del self._lines[line]
            turn = waiting.popleft()
            if waiting:
                self._lines[line] = waiting  # behind the others
            if not turn.done():  # cancelled, that is
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._next)
                return
        self._going = False
