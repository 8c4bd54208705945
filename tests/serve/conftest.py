"""A server of the public internet's part, a canary that nobody may reach, and decoders."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from mm.model import MultimodalModel
from mm.serve.fetch import Network
from mm.serve.media import MediaDecoder
from mm.testing import tiny_model

from .attack import text_model

PUBLIC = "93.184.215.14"  # stands for the server of `Web`; no packet goes there


class Pages(BaseHTTPRequestHandler):
    """/file, /redirect?to=URL, and the ways to misbehave."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        page = urlsplit(self.path)
        try:
            getattr(self, "page_" + page.path.strip("/"))(
                {key: value[0] for key, value in parse_qs(page.query).items()}
            )
        except OSError:
            self.close_connection = True  # the client has had enough

    def start(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def page_file(self, query: dict[str, str]) -> None:
        self.start(Content_Length="4", Content_Type=query.get("type", "image/png"))
        self.wfile.write(b"file")

    def page_redirect(self, query: dict[str, str]) -> None:
        self.start(int(query.get("status", "302")), Location=query["to"], Content_Length="0")

    def page_loop(self, query: dict[str, str]) -> None:
        self.start(302, Location="/loop", Content_Length="0")

    def page_missing(self, query: dict[str, str]) -> None:
        self.start(404, Content_Length="0")

    def page_zipped(self, query: dict[str, str]) -> None:
        self.start(Content_Encoding="gzip", Content_Length="0")

    def page_announced(self, query: dict[str, str]) -> None:
        self.start(Content_Length=str(10**15))

    def page_short(self, query: dict[str, str]) -> None:
        self.start(Content_Length="100")
        self.wfile.write(b"file")

    def page_endless(self, query: dict[str, str]) -> None:
        self.start()
        while True:
            self.wfile.write(bytes(1 << 16))

    def page_slow(self, query: dict[str, str]) -> None:
        self.start()
        while not self.server.over.wait(0.05):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def page_continue(self, query: dict[str, str]) -> None:
        while not self.server.over.wait(0.01):  # type: ignore[attr-defined]
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        return None


class Web:
    """What `fetch` sees of the internet: names and their addresses, of which PUBLIC alone is served.

    Every other connection, to whatever address, is led to the canary, which counts it.
    """

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        self.server.hosts, self.server.over = [], threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.canary = socket.create_server(("127.0.0.1", 0))
        self.hits = 0
        threading.Thread(target=self._count, daemon=True).start()
        self.names: dict[
            str, list[list[str]]
        ] = {}  # what a name resolves to, each time that it is asked; then the last
        self.asked: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.network = Network(self._resolve, self._connect)

    @property
    def hosts(self) -> list[str]:
        """The header Host of every request that was served."""
        return self.server.hosts  # type: ignore[attr-defined]

    def close(self) -> None:
        self.server.over.set()  # type: ignore[attr-defined]
        self.server.shutdown()
        self.server.server_close()
        self.canary.close()

    def _count(self) -> None:
        while True:
            try:
                self.canary.accept()[0].close()
            except OSError:
                return  # closed: the test is over
            self.hits += 1

    def _resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.names.get(host, [["127.0.0.1"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def _connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append((address, port))
        served = address == PUBLIC and port in (80, 443)
        place = self.server.server_address[:2] if served else self.canary.getsockname()
        return socket.create_connection((str(place[0]), int(place[1])), seconds)


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.close()


@pytest.fixture(scope="session")
def decoder() -> Iterator[MediaDecoder]:
    """Of a tiny model with all towers, default limits."""
    with MediaDecoder(tiny_model().media_specs()) as decoder:
        yield decoder


@pytest.fixture(scope="session")
def plain() -> MultimodalModel:
    """A model of text alone, whose server starts at once."""
    return text_model()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line of what was counted, where `-v` asks for more than dots."""
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")

    def print_line(line: str) -> None:
        if request.config.get_verbosity() > 0:
            with capture.global_and_fixture_disabled():
                print(f"\n  counted: {line}")

    return print_line


@pytest.fixture(scope="session")
def model() -> MultimodalModel:
    """One with all towers and an alignment tower."""
    return tiny_model(embedding_dim=8).eval()
