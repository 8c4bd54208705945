"""A Server under uvicorn: in the foreground for `mm serve`, in a thread for tests and benchmarks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from mm.model import MultimodalModel
from mm.serve.app import Server
from mm.serve.connection import bounded_protocol

GOING_DOWN = 5  # seconds that answers have to end once the server was told to


def http_server(server: Server, host: str, port: int) -> uvicorn.Server:
    config = uvicorn.Config(
        server.app,
        host,
        port,
        http=bounded_protocol(server.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=GOING_DOWN,
        h11_max_incomplete_event_size=1 << 15,
        backlog=1024,
    )
    return uvicorn.Server(config)


@dataclass(frozen=True)
class Running:
    url: str
    server: Server


@contextmanager
def running(model: MultimodalModel, **options: Any) -> Iterator[Running]:
    """`with running(model) as here:` serves at `here.url`, on a free port of this machine; `options` are Server's."""
    server = Server(model, **options)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        port = listening.getsockname()[1]
        http = http_server(server, "127.0.0.1", port)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, name="mm-http")
        thread.start()
        try:
            server.wait()
            yield Running(f"http://127.0.0.1:{port}", server)
        finally:
            http.should_exit = True
            thread.join()
            server.close()
