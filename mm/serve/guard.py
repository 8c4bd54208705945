"""What every request passes before it reaches a route: who may ask, from where, how much and for how long.

head -> its turn -> Host, Origin, key -> body, counted and timed -> route -> answer, unless the client has gone or time
is up
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import secrets
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm.serve.errors import error_response
from mm.serve.limits import GRACE, MediaLimits, Refused, ServeLimits
from mm.serve.metrics import Metrics
from mm.serve.turns import Turns

LOG = logging.getLogger("mm.serve")
LINGER = 5.0  # seconds that the rest of a refused request's body is awaited
WITH_BODY = ("POST", "PUT", "PATCH")
PIECE = 1 << 18  # bytes
HEALTH = "/health"  # has a line of its own: who has many requests may still ask whether they will be answered
UPLOADS = "/v1/files"  # takes forms; all else that is sent is JSON
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware. Puts into `scope["state"]`: `request_id`; `body` (bytearray); `client`, whose places the request
    takes; `deadline`, in the event loop's time; `exits`, an ExitStack that is closed however the request ends."""

    def __init__(
        self,
        app: ASGIApp,
        limits: ServeLimits,
        media: MediaLimits,
        metrics: Metrics,
        api_key: str | None = None,
        hosts: tuple[str, ...] = (),
    ) -> None:
        self.app, self.limits, self.media, self.metrics = app, limits, media, metrics
        self._key, self._hosts = api_key, {*LOCAL_NAMES, *hosts}
        self._held, self._turns = 0, Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no websockets here
        reply = _Reply(send, secrets.token_hex(8), scope["method"] in WITH_BODY)
        start, client = time.perf_counter(), (scope.get("client") or ["?"])[0]
        await self._turns.mine(HEALTH if scope["path"] == HEALTH else client)
        try:
            with ExitStack() as exits:
                self._check(Headers(scope=scope))
                state = scope.setdefault("state", {})
                state |= {"request_id": reply.request_id, "exits": exits, "client": client}
                # Nothing here is so large that pieces of it are worth the ways to ask for them.
                scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]
                state["body"] = await self._body(scope, receive, exits)
                reply.unread = False
                state["deadline"] = asyncio.get_running_loop().time() + self.limits.deadline_seconds
                await self._answer(scope, receive, reply)
        except Refused as refused:
            await self._refuse(refused, scope, receive, reply)
        except TimeoutError:
            refused = Refused("deadline_exceeded", "the answer was not finished, or not read, in time")
            await self._refuse(refused, scope, receive, reply)
        except Exception:
            LOG.exception("%s %s %r failed", reply.request_id, scope["method"], scope["path"])
            await self._refuse(Refused("internal_error", ""), scope, receive, reply)
        finally:
            self.metrics.request_ended(scope, reply.status, time.perf_counter() - start)
            LOG.info("%s %s %r %s", reply.request_id, scope["method"], scope["path"], reply.status or "-")

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._key is None and _name(host) not in self._hosts:
            # A page elsewhere can give its own name this machine's address (DNS rebinding).
            raise Refused("host_not_allowed", f"Host: {host}")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            raise Refused("origin_not_allowed", f"Origin: {origin}, Host: {host}")
        if self._key is not None and not hmac.compare_digest(_given_key(headers), self._key.encode()):
            raise Refused("invalid_api_key", "no or another key")

    async def _body(self, scope: Scope, receive: Receive, exits: ExitStack) -> bytearray:
        if scope["method"] not in WITH_BODY:
            return bytearray()
        headers, most = Headers(scope=scope), self.media.body_bytes
        declared = headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared != ("multipart/form-data" if scope["path"] == UPLOADS else "application/json"):
            raise Refused("unsupported_media_type", f"Content-Type: {declared}")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refused("unsupported_media_type", "an encoded body")
        if int(headers.get("content-length", "0")) > most:
            raise Refused("body_too_large", f"{headers['content-length']} bytes")
        held = 0

        def release() -> None:
            self._held -= held

        exits.callback(release)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused("body_timeout", "the client went away")
                    chunk = message.get("body", b"")
                    scope["state"]["read"] = not message.get("more_body")
                    held += len(chunk)
                    self._held += len(chunk)
                    if held > most:
                        raise Refused("body_too_large", f"more than {most:,} bytes")
                    if self._held > self.limits.held_bytes:
                        raise Refused("server_busy", f"bodies of {self._held:,} bytes are held")
                    body += chunk
                    if not message.get("more_body"):
                        return body
        except TimeoutError:
            raise Refused("body_timeout", f"{held:,} bytes in {self.limits.body_seconds:g} s") from None

    async def _answer(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        """Runs the route, for as long as there is a client to hear it."""
        gone, read = asyncio.Event(), 0

        async def replay() -> Message:
            """The body once more, for the routes that read it bit by bit."""
            nonlocal read
            body = scope["state"].get("body")
            if body is not None:
                piece, read = bytes(body[read : read + PIECE]), read + PIECE
                if read >= len(body):
                    del scope["state"]["body"]
                return {"type": "http.request", "body": piece, "more_body": "body" in scope["state"]}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            await self.app(scope, replay, reply)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async with asyncio.timeout(self.limits.deadline_seconds + GRACE):
            answer, watcher = asyncio.create_task(run()), asyncio.create_task(watch())
            try:
                await asyncio.wait((answer, watcher), return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() and not reply.complete:
                    answer.cancel()
                    reply.status = reply.status or 499  # as nginx's logs say that the client went away
                await asyncio.wait((answer,))
                if not answer.cancelled():
                    answer.result()
            finally:
                answer.cancel()
                watcher.cancel()

    async def _refuse(self, refused: Refused, scope: Scope, receive: Receive, reply: _Reply) -> None:
        log_refused(refused, reply.request_id)
        self.metrics.refused(refused.code)
        if reply.started:
            return
        response = error_response(refused, reply.request_id)
        if refused.code == "invalid_api_key":
            page = "text/html" in Headers(scope=scope).get("accept", "")
            response.headers["WWW-Authenticate"] = 'Basic realm="mm", charset="UTF-8"' if page else "Bearer"
        unread = reply.unread and not scope.get("state", {}).get("read")
        if unread and (refused.code == "body_timeout" or not await _discarded(scope, receive)):
            response.headers["Connection"] = "close"
        await response(scope, receive, reply)


class _Reply:
    """`send` with the headers that every answer has; knows how far the answer is, and whether there is a body that was
    not read."""

    def __init__(self, send: Send, request_id: str, unread: bool) -> None:
        self._send, self.request_id, self.unread = send, request_id, unread
        self.status, self.started, self.complete = 0, False, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True
        await self._send(message)


async def _discarded(scope: Scope, receive: Receive) -> bool:
    """Whether the rest of the body came soon: a client that cannot send it all may never read why it was refused."""
    if "expect" in Headers(scope=scope):
        return False  # it waits to be asked for its body
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body"):
                pass
            return True
    return False


def log_refused(refused: Refused, request_id: str) -> None:
    LOG.info("%s refused, %s: %s", request_id, refused.code, refused.detail)


def _place(origin: str) -> str | None:
    """Name and port of an Origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _given_key(headers: Headers) -> bytes:
    """`Bearer KEY`, or the password of `Basic`, which browsers ask for."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return given.strip().encode("latin-1")  # as headers were decoded
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(given, validate=True).partition(b":")[2]
        except ValueError:  # what is not base64, and what is not ASCII
            return b""
    return b""
