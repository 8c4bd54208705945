"""Connections that are slow, silent or never read: everyone else is answered all the same."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mm.serve.limits import ServeLimits
from mm.serve.run import Running, running

from .attack import CHAT, ELSEWHERE, Health, answer, asked, check_error, head, idle, opened, quiet_log, whole, within

COUNTS = [16, pytest.param(200, marks=pytest.mark.slow)]
LIMITS = ServeLimits(header_seconds=0.7, body_seconds=0.7, deadline_seconds=2)


@pytest.fixture(scope="module")
def here(plain: Any) -> Iterator[Running]:
    with running(plain, limits=LIMITS) as here:
        yield here


def slow_head(here: Running) -> tuple[socket.socket, bytes]:
    return opened(here), whole(here)


def slow_body(here: Running) -> tuple[socket.socket, bytes]:
    connection = opened(here)
    connection.sendall(head(here, Content_Length="1000"))
    return connection, b" " * 1000


def slow_chunks(here: Running) -> tuple[socket.socket, bytes]:
    connection = opened(here)
    connection.sendall(head(here, Transfer_Encoding="chunked"))
    return connection, b"1\r\n \r\n" * 1000


def silent(here: Running) -> tuple[socket.socket, bytes]:
    return opened(here), b""


def never_reading(here: Running, times: int = 1) -> tuple[socket.socket, bytes]:
    """Asks again and again, and reads none of it."""
    connection = opened(here, receive=4096)
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError, ConnectionError):  # the server takes no more, or has ended it
        for _ in range(times):
            connection.send(head(here, "GET /metrics") * 20)
    return connection, b""


def never_reading_answers(here: Running) -> tuple[socket.socket, bytes]:
    connection = opened(here, receive=4096)
    connection.sendall(whole(here, CHAT | {"stream": True, "max_tokens": 400, "logprobs": True, "top_logprobs": 20}))
    return connection, b""


def half_open(here: Running) -> tuple[socket.socket, bytes]:
    """Says that it will send no more, in the middle of a request."""
    connection = opened(here)
    connection.sendall(whole(here)[:-3])
    connection.shutdown(socket.SHUT_WR)
    return connection, b""


def half_closed(here: Running) -> tuple[socket.socket, bytes]:
    connection = opened(here)
    connection.sendall(whole(here, CHAT | {"stream": True, "max_tokens": 100}))
    connection.shutdown(socket.SHUT_WR)
    return connection, b""


KINDS = [slow_head, slow_body, slow_chunks, silent, never_reading, never_reading_answers, half_open, half_closed]


@contextlib.contextmanager
def held(here: Running, kind: Callable[[Running], tuple[socket.socket, bytes]], count: int) -> Iterator[list[Any]]:
    """So many of them, each with a byte now and then."""
    slow = [kind(here) for _ in range(count)]
    over = threading.Event()

    def drip() -> None:
        at = 0
        while not over.wait(0.1):
            for connection, data in slow:
                with contextlib.suppress(OSError):  # the server has ended it
                    connection.send(data[at : at + 1])
            at += 1

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield [connection for connection, _ in slow]
    finally:
        over.set()
        thread.join()
        for connection, _ in slow:
            connection.close()


def ended(connection: socket.socket) -> bool:
    """Whether the server has ended it; reads what it said."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_others_are_answered(here: Running, kind: Any, count: int, tell: Callable[[str], None]) -> None:
    with held(here, kind, count) as slow, Health(here) as health:
        start = time.monotonic()
        found = asked(here, address=ELSEWHERE)
        seconds = time.monotonic() - start
        assert within(5, lambda: health.count >= 3)
        unread = kind in (never_reading, never_reading_answers)
        # What was sent is never read here: that it ends is seen when the server forgets it.
        assert unread or within(8, lambda: all(map(ended, slow)))
    times = f"/health {health.worst:.2f} s at most of {health.count}, a chat {seconds:.2f} s"
    tell(f"{count} sockets, {kind.__name__}: {times}")
    assert health.worst < 1 and found.status_code == 200
    assert within(10, lambda: idle(here))


def test_who_never_reads_is_dropped_in_time(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.serve.limits.GRACE", 0.1)
    limits = ServeLimits(header_seconds=0.4, body_seconds=0.4, deadline_seconds=0.4)
    with running(plain, limits=limits) as here, held(here, lambda here: never_reading(here, 200), 1) as slow:
        assert limits.request_seconds == pytest.approx(1)
        gone = select.poll()
        for connection in slow:
            gone.register(connection, 0)  # whether the server has ended it, without reading any of it
        assert within(20, lambda: len(gone.poll(0)) == 1)


def test_a_head_and_a_body_time_out(here: Running) -> None:
    for start, expected in ((b"GET / HT", None), (head(here, Content_Length="9"), "body_timeout")):
        with opened(here) as connection:
            connection.sendall(start)
            begun = time.monotonic()
            found = answer(connection)
            assert 0.5 < time.monotonic() - begun < 3
            assert (None if found is None else check_error(*found)) == expected


@pytest.mark.parametrize("kind", [slow_head, slow_body, silent], ids=lambda kind: kind.__name__)
def test_those_silent_longest_go_first(plain: Any, kind: Any) -> None:
    with running(plain, limits=ServeLimits(connections=16)) as here, quiet_log():
        with held(here, kind, 16) as slow:
            time.sleep(0.2)
            for _ in range(6):
                assert asked(here, address=ELSEWHERE).status_code == 200  # one more than there may be
            assert 1 <= sum(map(ended, slow)) <= 7
        assert within(5, lambda: idle(here))


def test_an_answer_at_work_is_never_dropped_for_a_newcomer(plain: Any) -> None:
    with running(plain, limits=ServeLimits(connections=4)) as here, opened(here) as first:
        first.sendall(whole(here, CHAT | {"max_tokens": 600}))
        assert within(5, lambda: here.server.places.used == 1)
        with held(here, silent, 40):
            found = answer(first)
        assert found is not None and found[0] == 200
