"""A Server under uvicorn: in the foreground for `mm serve`, in a thread for tests and benchmarks."""

from __future__ import annotations

import asyncio
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

GOING_DOWN = 3  # seconds that answers have to end once the server was told to; then they are ended
GRACE = 2  # seconds to tell their clients so


class HttpServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(GOING_DOWN, self._server.worker.end)
        await super().shutdown(sockets)
        ending.cancel()


def http_server(server: Server, host: str, port: int) -> HttpServer:
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
        timeout_graceful_shutdown=GOING_DOWN + GRACE,
        h11_max_incomplete_event_size=1 << 15,
        backlog=1024,
    )
    return HttpServer(config, server)


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
