"""What attacks on a server have in common: raw sockets, what must be so afterwards, and what any refusal looks like."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPResponse
from typing import Any

import httpx

from mm.model import MultimodalModel
from mm.serve.limits import CODES
from mm.serve.run import Running
from mm.testing import tiny_decoder, tiny_tokenizer

ELSEWHERE = "127.0.0.2"  # another client's address
CHAT: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "what?"}], "max_tokens": 2}


def text_model() -> MultimodalModel:
    """One without towers, so that no decoder has to start."""
    tokenizer = tiny_tokenizer()
    return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size), {}).eval()


def port_of(here: Running) -> int:
    return int(here.url.rsplit(":", 1)[1])


def opened(here: Running, address: str = "127.0.0.1", receive: int | None = None) -> socket.socket:
    """A connection from this address, with so small a receive buffer."""
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.bind((address, 0))
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port_of(here)))
    return connection


def head(here: Running, line: str = "POST /v1/chat/completions", **headers: str) -> bytes:
    """A request's head; `headers` with _ for -."""
    given = {"Host": f"127.0.0.1:{port_of(here)}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    return "".join(
        [f"{line} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in given.items()), "\r\n"]
    ).encode()


def whole(here: Running, form: Mapping[str, Any] = CHAT, line: str = "POST /v1/chat/completions") -> bytes:
    """A request with its body."""
    body = json.dumps(form).encode()
    return head(here, line, Content_Length=str(len(body))) + body


def answer(connection: socket.socket) -> tuple[int, Mapping[str, str], bytes] | None:
    """The first answer on a connection; None where it ended without one."""
    response = HTTPResponse(connection)
    try:
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    except (OSError, ValueError, EOFError):
        return None
    except Exception as error:  # http.client.HTTPException: what came is no answer, or a part of one
        assert type(error).__name__ in ("BadStatusLine", "RemoteDisconnected", "IncompleteRead"), error
        return None
    finally:
        response.close()


def asked(here: Running, form: Mapping[str, Any] = CHAT, address: str = "127.0.0.1") -> httpx.Response:
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=here.url, transport=transport, timeout=60) as client:
        return client.post("/v1/chat/completions", json=form)


def check_error(status: int, headers: Mapping[str, str], body: bytes, marks: tuple[str, ...] = ()) -> str:
    """The code of an error; fails unless it is of the fixed form and has nothing of the request but a field's name."""
    error = json.loads(body)["error"]
    assert json.loads(body) == {"error": error} and set(error) == {"message", "type", "param", "code", "request_id"}
    assert (status, error["message"]) == CODES[error["code"]]
    assert error["request_id"] == headers["x-request-id"] and headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert not any(mark.encode() in body or mark in str(headers) for mark in marks)
    assert ("retry-after" in headers) == (status in (429, 503))
    return error["code"]


class Health(threading.Thread):
    """Asks for /health again and again, each time on a new connection; `worst` is the longest that it took, seconds.
    On a plain socket: what a client takes to make itself ready, as httpx 70 ms, is not the server's."""

    def __init__(self, here: Running) -> None:
        super().__init__()
        self._here, self._over, self.worst, self.count = here, threading.Event(), 0.0, 0

    def run(self) -> None:
        while not self._over.is_set():
            start = time.monotonic()
            try:
                with opened(self._here) as connection:
                    connection.sendall(head(self._here, "GET /health"))
                    found = answer(connection)
            except OSError:
                found = None
            seconds = time.monotonic() - start if found is not None and found[0] == 200 else float("inf")
            self.worst = max(self.worst, seconds)
            self.count += 1
            self._over.wait(0.05)

    def __enter__(self) -> Health:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()


class Log(logging.Handler):
    """Keeps what should never be said: errors, and whatever comes with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.said.append(self.format(record))


@contextlib.contextmanager
def quiet_log() -> Iterator[Log]:
    """Fails if the server, uvicorn or asyncio logs an error or a traceback."""
    log, loggers = Log(), [logging.getLogger(name) for name in ("mm.serve", "uvicorn", "asyncio")]
    for logger in loggers:
        logger.addHandler(log)
    try:
        yield log
    finally:
        for logger in loggers:
            logger.removeHandler(log)
    assert not log.said, log.said[0]


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def idle(here: Running) -> bool:
    """Whether no slot, page or ticket is taken."""
    worker = here.server.worker
    return here.server.places.used == 0 and worker.idle and worker.engine.pages.used == 0


def processes(root: int | None = None) -> set[int]:
    """All that descend from a process, by default from this one."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:  # it may have ended by now
            parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found, new = set[int](), {root or os.getpid()}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
