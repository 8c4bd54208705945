"""What a stranger's URL can make the server do: nothing but read from hosts that are allowed, at public addresses."""

from __future__ import annotations

import base64
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mm.serve.address import is_public
from mm.serve.fetch import Network, connect, fetch, resolve
from mm.serve.limits import MediaLimits, Refused

from .conftest import PUBLIC, Web
from .hostile import PRIVATE, direct_urls

LIMITS = MediaLimits(hosts=("images.example", "other.example"), fetch_seconds=5)

REBOUND = [[[PUBLIC], [address]] for address in PRIVATE[:20]]


def refusal(url: str, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        fetch(url, options.pop("limits", LIMITS), **options)
    assert "\n" not in caught.value.detail and str(caught.value) == caught.value.code
    return caught.value.code


def test_500_urls_reach_nothing(web: Web) -> None:
    """Neither through the default network, on which the canary is a real port, nor through one that leads all to it."""
    port = web.canary.getsockname()[1]
    urls = direct_urls(port)
    assert len(set(urls)) >= 500
    for url in urls:
        assert refusal(url) == "url_not_allowed"
        assert refusal(url, network=web.network) == "url_not_allowed"
        assert refusal(url, limits=MediaLimits()) == "url_not_allowed"
    assert web.asked == web.connected == [] and web.hits == 0
    connect("127.0.0.1", port, 5).close()  # the canary does sing
    for _ in range(100):
        time.sleep(0.01 * (web.hits == 0))
    assert web.hits == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_allowed_names_at_other_than_public_addresses(web: Web, scheme: str) -> None:
    for address in PRIVATE:
        for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
            web.names["images.example"] = [answer]
            assert refusal(f"{scheme}://images.example/file", network=web.network) == "url_not_allowed"
    assert web.connected == [] and web.hits == 0
    web.names["images.example"] = [[]]
    assert refusal(f"{scheme}://images.example/file", network=web.network) == "url_not_fetched"


@pytest.mark.parametrize("answers", REBOUND, ids=lambda answers: answers[1][0])
def test_a_name_that_changes_its_address_is_asked_once(web: Web, answers: list[list[str]]) -> None:
    web.names["images.example"] = list(answers)
    assert fetch("http://images.example/file", LIMITS, "image", web.network) == b"file"
    assert web.asked == ["images.example"] and web.connected == [(PUBLIC, 80)] and web.hits == 0
    web.names["images.example"] = list(answers)
    assert refusal("http://images.example/redirect?to=/file", network=web.network) == "url_not_allowed"
    assert web.connected == [(PUBLIC, 80)] * 2 and web.hits == 0


def test_redirects_are_urls_like_any_other(web: Web) -> None:
    web.names["images.example"] = [[PUBLIC]]
    urls = [url for url in direct_urls(web.canary.getsockname()[1]) if url.startswith(("http://", "file:", "//"))]
    for status, url in zip([301, 302, 303, 307, 308] * 40, urls[::2], strict=False):
        if url.startswith("//images.example"):
            continue
        code = refusal(f"http://images.example/redirect?status={status}&to={quote(url)}", network=web.network)
        assert code in ("url_not_allowed", "url_not_fetched")
    assert set(web.connected) == {(PUBLIC, 80)} and web.hits == 0 and len(web.connected) >= 150


def test_redirects_that_are_allowed(web: Web) -> None:
    web.names |= {"images.example": [[PUBLIC]], "other.example": [[PUBLIC]]}
    for place in ("/file", "file", "//other.example/file", "http://other.example:80/file?a=b#c"):
        assert fetch(f"http://images.example/redirect?to={quote(place)}", LIMITS, "image", web.network) == b"file"
    assert {"images.example", "other.example"} == set(web.hosts)
    assert refusal("http://images.example/loop", network=web.network) == "url_not_allowed"
    web.connected.clear()
    assert refusal(
        "http://images.example/loop", limits=MediaLimits(hosts=("images.example",), redirects=0), network=web.network
    )
    assert len(web.connected) == 1


@pytest.mark.parametrize(
    ("page", "code"),
    [
        ("missing", "url_not_fetched"),
        ("zipped", "url_not_fetched"),
        ("short", "url_not_fetched"),
        ("slow", "url_not_fetched"),
        ("continue", "url_not_fetched"),
        ("redirect?to=%0d%0aX", "url_not_allowed"),
        ("announced", "media_too_large"),
        ("endless", "media_too_large"),
        ("file?type=text/html", "unsupported_media_type"),
        ("file?type=audio/wav", "unsupported_media_type"),
    ],
)
def test_misbehaviour_is_refused_in_time(web: Web, page: str, code: str) -> None:
    web.names["images.example"] = [[PUBLIC]]
    limits = MediaLimits(hosts=("images.example",), fetch_seconds=1, image_bytes=1_000_000)
    start, threads = time.monotonic(), threading.active_count()
    assert refusal(f"http://images.example/{page}", limits=limits, kind="image", network=web.network) == code
    assert time.monotonic() - start < 4
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)], threads


def test_an_address_that_does_not_answer_is_followed_by_the_next(web: Web) -> None:
    def connect(address: str, port: int, seconds: float) -> socket.socket:
        if address == "8.8.8.8":
            raise ConnectionRefusedError("closed")
        return web.network.connect(address, port, seconds)

    web.names["images.example"] = [["8.8.8.8", PUBLIC]]
    network = Network(web.network.resolve, connect)
    assert fetch("http://images.example/file", LIMITS, None, network) == b"file"
    web.names["images.example"] = [["8.8.8.8"]]
    assert refusal("http://images.example/file", network=network) == "url_not_fetched"


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[str | None]]]:
    """A TLS server with a certificate for images.example, that everybody here trusts; and the names asked of it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=images.example"
    )
    names = ["-addext", "subjectAltName=DNS:images.example", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    asked: list[str | None] = []
    context.sni_callback = lambda connection, name, context: asked.append(name)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain = listener.accept()[0]
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    request = connection.recv(1 << 16)
                    asked.append(request.split(b"Host: ")[1].split(b"\r\n")[0].decode())
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfile")
            except OSError:
                continue  # the client does not trust this server

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1], asked
    listener.close()


def test_tls_speaks_of_the_name_and_checks_it(tls: tuple[int, list[str | None]]) -> None:
    port, asked = tls
    network = Network(lambda host, port: [PUBLIC], lambda address, _, seconds: connect("127.0.0.1", port, seconds))
    assert fetch("https://images.example/file", LIMITS, None, network) == b"file"
    assert asked == ["images.example", "images.example"]  # SNI, Host
    assert refusal("https://other.example/file", network=network) == "url_not_fetched"  # its certificate is another's


def test_a_server_that_hangs_in_the_handshake_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        network = Network(lambda *_: [PUBLIC], lambda *_: connect("127.0.0.1", silent.getsockname()[1], 60))
        limits = MediaLimits(hosts=("images.example",), fetch_seconds=0.5)
        start = time.monotonic()
        assert refusal("https://images.example/", limits=limits, network=network) == "url_not_fetched"
        assert time.monotonic() - start < 4


@pytest.mark.parametrize("address", PRIVATE)
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", PUBLIC, "::ffff:8.8.8.8", "64:ff9b::808:808", "2606:4700::1111", "2001:4860:4860::8888"]
)
def test_public(address: str) -> None:
    assert is_public(address)


def test_names_resolve_to_digits() -> None:
    assert {"127.0.0.1"} <= set(resolve("localhost", 80)) <= {"127.0.0.1", "::1"}


def test_hosts_are_names() -> None:
    for host in (
        "Images.example",
        "images.example.",
        "1.2.3.4",
        "2130706433",
        "a b",
        "*",
        "*.example",
        "",
        "[::1]",
        "::1",
        "a:80",
    ):
        with pytest.raises(ValueError, match=re.escape(repr(host))):
            MediaLimits(hosts=(host,))
    with pytest.raises(ValueError, match="image_bytes=0"):
        MediaLimits(image_bytes=0)


def test_data_urls() -> None:
    text = base64.b64encode(b"\xff\x00file?").decode()
    for head in ("data:image/png;base64,", "DATA:;base64,", "data:image/png;charset=utf-8;base64,", "data:;BASE64,"):
        assert fetch(head + text, MediaLimits(), "image") == b"\xff\x00file?"
    assert refusal("data:audio/wav;base64," + text, kind="image") == "unsupported_media_type"
    for url in ("data:", "data:,x", "data:image/png,%00", "data:image/png;base64" + text, "data://x;base64"):
        assert refusal(url, kind="image") == "malformed_url"
    for wrong in (
        "=",
        text[:-1],
        text + "=",
        text + "====",
        text + "\n",
        " " + text,
        text.replace("/", "_"),
        "%2B",
        "=" * 4,
        "A===",
        "é",
        text + text,
    ):
        assert refusal("data:image/png;base64," + wrong, kind="image") == "malformed_base64"
    small = MediaLimits(image_bytes=7)
    assert fetch("data:;base64," + text, small, "image") == b"\xff\x00file?"
    assert (
        refusal("data:;base64," + base64.b64encode(b"12345678").decode(), limits=small, kind="image")
        == "media_too_large"
    )
