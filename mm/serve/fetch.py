"""The bytes behind a URL that a stranger sent: of a data: URL, or of a host that is allowed by name.

URL -> allowed? -> name resolved once -> all addresses public? -> connect to exactly those -> bytes, counted
 ^                                                                                           |
 +------------------------------- a redirect is a URL like any other ------------------------+
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urljoin

from mm.serve.address import PORTS, Target, check_addresses, read_url
from mm.serve.body import decode_base64
from mm.serve.formats import check_declared
from mm.serve.limits import MediaLimits, Refused
from mm.types import Kind

CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_DATA = re.compile(r"data:(?P<type>[!-+\--~]{0,200}?)(?P<base64>;base64)?,", re.IGNORECASE)
_FAILURES = (OSError, http.client.HTTPException)  # ssl.SSLError and timeouts are OSErrors


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, as the system resolves it."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to an address, given in digits: nothing is resolved."""
    return socket.create_connection((address, port), seconds)


@dataclass(frozen=True)
class Network:
    """How names are resolved and addresses reached. Tests bring their own."""

    resolve: Callable[[str, int], list[str]] = resolve
    connect: Callable[[str, int, float], socket.socket] = connect


INTERNET = Network()


def fetch(url: str, limits: MediaLimits, kind: Kind | None = None, network: Network = INTERNET) -> bytes:
    """The file behind `url`, of at most the bytes that `kind` may have.

    Where `kind` is given, the declared type must speak of it. Raises Refused: url_not_allowed, url_not_fetched,
    malformed_url, malformed_base64, media_too_large, unsupported_media_type.
    """
    if url[:5].lower() == "data:":
        return _read_data_url(url, limits, kind)
    deadline = time.monotonic() + limits.fetch_seconds
    for _ in range(limits.redirects + 1):
        target = read_url(url, limits)
        answer = _ask(target, limits.bytes_of(kind), kind, deadline, network)
        if isinstance(answer, bytes):
            return answer
        try:
            url = urljoin(str(target), answer.location)
        except ValueError as error:  # brackets that hold no address
            raise Refused("url_not_allowed", f"{target.host} redirects to no URL: {error}") from None
        if target.scheme == "https" and not url.lower().startswith("https:"):
            raise Refused("url_not_allowed", f"{target.host} redirects from https to something else")
    raise Refused("url_not_allowed", f"more than {limits.redirects} redirects")


@dataclass(frozen=True)
class _Redirect:
    location: str


def _read_data_url(url: str, limits: MediaLimits, kind: Kind | None) -> bytes:
    found = _DATA.match(url, 0, 300)
    if found is None or not found["base64"]:
        raise Refused("malformed_url", f"{url[:60]!r}... is not data:TYPE;base64,...")
    if kind is not None:
        check_declared(kind, found["type"])
    return decode_base64(url[found.end() :], limits.bytes_of(kind))


def _ask(target: Target, limit: int, kind: Kind | None, deadline: float, network: Network) -> bytes | _Redirect:
    try:
        addresses = check_addresses(target.host, network.resolve(target.host, target.port))
        with _connected(target, addresses, deadline, network) as connection:
            headers = {"Accept": f"{kind or '*'}/*", "Accept-Encoding": "identity", "User-Agent": "mm"}
            connection.request("GET", target.path, headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return _Redirect(response.getheader("Location", ""))
            return _read(target, response, limit, kind, deadline)
    except (*_FAILURES, UnicodeError) as error:  # UnicodeError: a name or a redirect that cannot be sent
        raise Refused("url_not_fetched", f"{target.host}: {type(error).__name__}: {error}") from None


@contextlib.contextmanager
def _connected(
    target: Target, addresses: list[str], deadline: float, network: Network
) -> Iterator[http.client.HTTPConnection]:
    """A connection to the first of the addresses that answers, which ends at the deadline whatever is going on."""
    plain = _first(addresses, target.port, deadline, network)
    with plain, _ended_at(deadline, plain):
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.default_port = PORTS[target.scheme]  # for the header Host
        connection.auto_open = 0  # it would resolve the name again
        connection.sock = plain
        if target.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=target.host)
        with contextlib.closing(connection):
            yield connection


def _first(addresses: list[str], port: int, deadline: float, network: Network) -> socket.socket:
    failure = OSError("no address")
    for address in addresses:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError("no time left to connect")
        try:
            return network.connect(address, port, left)
        except OSError as error:
            failure = error
    raise failure


@contextlib.contextmanager
def _ended_at(deadline: float, connection: socket.socket) -> Iterator[None]:
    """Timeouts of a socket hold for one read: a server that sends a byte a second would never meet one."""
    twin = connection.dup()  # TLS takes the first over

    def end() -> None:
        with contextlib.suppress(OSError):  # the server has ended it
            twin.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        twin.close()


def _read(target: Target, response: http.client.HTTPResponse, limit: int, kind: Kind | None, deadline: float) -> bytes:
    if response.status != 200:
        raise Refused("url_not_fetched", f"{target.host} answers {response.status}")
    coding = response.getheader("Content-Encoding", "identity")
    if coding.strip().lower() != "identity":
        raise Refused("url_not_fetched", f"{target.host} sends it compressed ({coding}), which was not asked for")
    if kind is not None:
        check_declared(kind, response.getheader("Content-Type"))
    data = bytearray()
    while (response.length or 0) <= limit and len(data) <= limit and (chunk := response.read(CHUNK)):
        data += chunk
    if max(len(data), response.length or 0) > limit:
        raise Refused("media_too_large", f"{target.host} sends more than {limit:,} bytes")
    if response.length or time.monotonic() > deadline:  # of a length that was announced, something is missing
        raise Refused("url_not_fetched", f"{target.host} ended, or ran out of time, after {len(data):,} bytes")
    return bytes(data)
