"""Connections that cost little while they are silent: heads must come in time, a whole exchange may take so long, one
request is in hand, and only so many are open.

uvicorn itself gives a client for ever to send its first head, and to read what was written; and it answers whatever is
sent ahead (HTTP pipelining, which no client in use does), read or not, as fast as it can.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mm.serve.errors import error_response
from mm.serve.guard import HEADERS, log_refused
from mm.serve.limits import Refused, ServeLimits


def bounded_protocol(limits: ServeLimits) -> type[H11Protocol]:
    """A uvicorn protocol whose connections share the limits `header_seconds`, `request_seconds` and `connections`."""
    stirred: dict[Bounded, None] = {}  # all that are open, those that have been silent longest first

    class Bounded(H11Protocol):
        """`_end` aborts it when it takes too long over what it does now."""

        _end: asyncio.TimerHandle | None = None
        _timed: Any = None  # the request that `_end` is set for

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # asyncio does this only where the socket that listens was made with its protocol's number; without it each
            # answer's second packet, and each event of a stream, waits 40 ms for the first to be acknowledged.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stir()
            self._end_in(limits.header_seconds)
            if len(stirred) > limits.connections:
                next(each for each in stirred if not each.at_work).abort()  # at least this one is not

        def data_received(self, data: bytes) -> None:
            self._stir()
            super().data_received(data)
            self._head_came()
            if self.conn.their_state is h11.DONE and self.conn.trailing_data[0]:
                self.cycle.keep_alive = False  # it did not wait for its answer, which is its last: RFC 9112, 9.3.2

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stir()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._stir()
            unread = self.transport.get_write_buffer_size()
            self._end_in(limits.deadline_seconds if unread else limits.header_seconds)
            self._head_came()  # the next request may be here already

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP is refused like all else, unless an answer has begun: then there is none to give."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.abort()
                return
            refused, request_id = Refused("malformed_request", msg), secrets.token_hex(8)
            log_refused(refused, request_id)
            answer = error_response(refused, request_id)
            answer.headers.update(HEADERS | {"X-Request-Id": request_id, "Connection": "close"})
            head = h11.Response(status_code=answer.status_code, headers=answer.raw_headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        @property
        def at_work(self) -> bool:
            """Whether it waits for the server, not the server for it."""
            whole = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
            return whole and not self.flow.write_paused

        def abort(self) -> None:
            self._forget()
            self.transport.abort()

        def _stir(self) -> None:
            stirred.pop(self, None)
            if not self.transport.is_closing():
                stirred[self] = None

        def _head_came(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete and self.cycle is not self._timed:
                self._timed = self.cycle
                self._end_in(limits.request_seconds)

        def _end_in(self, seconds: float) -> None:
            if self._end is not None:
                self._end.cancel()
            self._end = self.loop.call_later(seconds, self.abort)

        def _forget(self) -> None:
            stirred.pop(self, None)
            if self._end is not None:
                self._end.cancel()
                self._end = None

    return Bounded
