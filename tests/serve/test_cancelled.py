"""Clients that go away at any moment leave nothing behind: no slot, page, thread, descriptor, process or task."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mm.serve.limits import ServeLimits
from mm.serve.run import Running, running
from mm.testing import tiny_model

from .attack import CHAT, answer, asked, descriptors, idle, opened, port_of, processes, quiet_log, whole, within
from .files import film, picture

LONG = CHAT | {"stream": True, "max_tokens": 400, "messages": [{"role": "user", "content": "what color? " * 150}]}


def shown(kind: str, data: bytes, mime: str) -> dict[str, Any]:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return CHAT | {"stream": True, "max_tokens": 400, "messages": [{"role": "user", "content": [part] * 3}]}


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    limits = ServeLimits(slots=16, per_client=16, max_length=1024, cache_tokens=16_384)
    with running(tiny_model().eval(), limits=limits) as here:
        yield here


def tasks(here: Running) -> int:
    """Of the server's event loop, seen from a request: its own four (the connection's, the guard's two, this)."""
    counts: list[int] = []
    settings = here.server.settings

    def counted() -> dict[str, Any]:
        counts.append(len(asyncio.all_tasks()))
        return settings()

    here.server.settings = counted  # type: ignore[method-assign]
    try:
        with opened(here) as connection:
            connection.sendall(whole(here, line="GET /v1/settings"))
            assert answer(connection) is not None
    finally:
        here.server.settings = settings  # type: ignore[method-assign]
    return counts[0]


def leave(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif how == "half":
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                pass
    connection.close()


def cancel(here: Running, forms: list[dict[str, Any]], number: int) -> None:
    """Asks, and leaves: at once, after some milliseconds, or after some events."""
    draw = random.Random(number)
    with opened(here) as connection:
        data = whole(here, draw.choice(forms))
        when = draw.choice(["within", "at once", "soon", "events"])
        connection.sendall(data[: draw.randrange(len(data))] if when == "within" else data)
        if when == "soon":
            time.sleep(draw.random() * 0.1)
        if when == "events":
            most = draw.randrange(1, 20_000)
            while most > 0 and (part := connection.recv(4096)):
                most -= len(part)
        leave(connection, draw.choice(["close", "reset", "half"]))


KILLED = """
import socket, sys, time
sockets = []
for _ in range(8):
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    connection.sendall(bytes.fromhex(sys.argv[2]))
    sockets.append(connection)
print("asked", flush=True)
time.sleep(60)
"""


def killed_client(here: Running, form: dict[str, Any]) -> None:
    """Eight streams of a process that is killed."""
    command = [sys.executable, "-c", KILLED, str(port_of(here)), whole(here, form).hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline() == b"asked\n"
        assert within(10, lambda: here.server.places.used > 0)
        client.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("count", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_cancelled_streams_leave_nothing(here: Running, count: int, tell: Callable[[str], None]) -> None:
    small, large = shown("image", picture(side=8), "image/png"), shown("video", film(frames=60), "video/mp4")
    forms = [CHAT | {"stream": True, "max_tokens": 400}, LONG, LONG | {"n": 4}, small, large]
    for form in forms:  # every thread that is kept for later has begun
        with opened(here) as connection:
            connection.sendall(whole(here, form | {"max_tokens": 4}))
            found = answer(connection)
            assert found is not None and found[0] == 200, found
    assert within(10, lambda: idle(here))
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("mm-")]
    before = descriptors(), processes(), tasks(here)
    start = time.monotonic()
    with quiet_log(), ThreadPoolExecutor(6) as clients:
        list(clients.map(lambda number: cancel(here, forms, number), range(count)))
        killed_client(here, LONG)
        assert within(30, lambda: idle(here))
        seconds = time.monotonic() - start
        assert asked(here).status_code == 200
        assert within(30, lambda: len(processes()) == len(before[1])), "a decoder is still there"
    assert within(5, lambda: descriptors() <= before[0]) and processes() == before[1]
    assert within(5, lambda: tasks(here) <= before[2])
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("mm-")]
    most = here.server.limits.slots + 8 + 2  # pools have their size; the model's thread and the server's
    assert len(threads) <= most and all(thread.is_alive() for thread in workers)
    assert here.server.worker.engine.pages.sound
    left = f"{descriptors()} descriptors, {len(processes())} children"
    tell(f"{count + 8} cancelled streams in {seconds:.0f} s, left: {left} as before")


def test_media_that_nobody_waits_for_are_not_opened(here: Running) -> None:
    """Once one item of a request is refused, or its client has gone, those that wait for a decoder never get one."""
    opened_items: list[int] = []
    gate = threading.Event()
    pool = here.server.opener._pool
    assert isinstance(pool, ThreadPoolExecutor)
    blocked = [pool.submit(gate.wait) for _ in range(pool._max_workers)]
    decoder = here.server.decoder
    assert decoder is not None
    original = decoder.open

    def counted(*args: Any) -> Any:
        opened_items.append(1)
        return original(*args)

    decoder.open = counted  # type: ignore[method-assign]
    try:
        with opened(here) as connection:
            connection.sendall(whole(here, shown("image", picture(), "image/png")))
            assert within(5, lambda: here.server.places.used == 1)
            time.sleep(0.1)
        assert within(5, lambda: idle(here))
    finally:
        gate.set()
        decoder.open = original  # type: ignore[method-assign]
    for each in blocked:
        each.result()
    assert (
        not opened_items and asked(here, shown("image", picture(), "image/png") | {"max_tokens": 2}).status_code == 200
    )
