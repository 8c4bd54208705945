"""Connections that cost nothing while they are silent: a request's head must come in time, and only so many may wait.

uvicorn itself gives a client for ever to send its first head.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mm.serve.limits import ServeLimits


def bounded_protocol(limits: ServeLimits) -> type[H11Protocol]:
    """A uvicorn protocol whose connections share the limits `header_seconds` and `connections`."""
    waiting: dict[Bounded, None] = {}  # those without a whole request's head, longest first

    class Bounded(H11Protocol):
        """`_limit` runs while a head is awaited: from connecting or from the end of the answer before."""

        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()
            if len(self.connections) > limits.connections:
                next(iter(waiting)).abort()  # at least this one waits

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._head_came()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle is None or self.cycle.response_complete:  # else the next request was here already
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_came()
            super().connection_lost(exc)

        def abort(self) -> None:
            self._head_came()
            self.transport.abort()

        def _await_head(self) -> None:
            self._head_came()
            self._limit = self.loop.call_later(limits.header_seconds, self.abort)
            waiting[self] = None

        def _head_came(self) -> None:
            waiting.pop(self, None)
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return Bounded
