"""Who may ask: keys, names of this machine, origins; and requests that try to be two."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mm.serve.run import Running, running

from .attack import CHAT, answer, check_error, head, idle, opened, port_of, quiet_log, whole, within
from .test_hostile_http import METHODS, ODD_PATHS, PATHS

KEY = "schlüssel"


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.fixture(scope="module")
def keyed(plain: Any) -> Iterator[Running]:
    with running(plain, api_key=KEY) as here:
        yield here


@pytest.fixture(scope="module")
def here(plain: Any) -> Iterator[Running]:
    with running(plain) as here:
        yield here


def test_every_route_and_method_needs_the_key(keyed: Running) -> None:
    wrong = [None, "", "Bearer", "Bearer  x", "Bearer x", f"Bearer {KEY}x", "bearer é", f"Digest {KEY}", KEY, "Basic é"]
    wrong += [
        "Basic x",
        "Basic =",
        basic(KEY),
        basic(f"{KEY}:"),
        basic(f"a:{KEY}:"),
        basic(f"a:b:{KEY}"),
        "Bearer \xff",
    ]
    paths = [*PATHS, *ODD_PATHS, "/", "/page/index.html", "/docs", "/openapi.json"]
    count = 0
    with httpx.Client(base_url=keyed.url) as client, quiet_log():
        for place, (method, path) in enumerate((method, path) for method in METHODS for path in paths):
            given = wrong[place % len(wrong)]
            headers = {} if given is None else {b"Authorization": given.encode()}
            found = client.request(method, path, headers=headers, json=CHAT)
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert check_error(401, found.headers, found.content, (KEY,)) == "invalid_api_key"
            count += 1
    assert count > 200


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer  {KEY}", basic(f"anyone:{KEY}"), basic(f":{KEY}")])
def test_the_key_opens(keyed: Running, given: str) -> None:
    headers = {b"Authorization": given.encode(), b"Host": b"any.example"}
    assert httpx.get(f"{keyed.url}/v1/models", headers=headers).status_code == 200
    assert httpx.post(f"{keyed.url}/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


def test_a_browser_is_asked_for_the_key(keyed: Running) -> None:
    found = httpx.get(keyed.url, headers={"Accept": "text/html"})
    assert found.status_code == 401 and found.headers["www-authenticate"].startswith("Basic")


def test_keys_are_compared_in_constant_time(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: bool(compared.append(both)))
    assert httpx.get(keyed.url, headers={b"Authorization": f"Bearer {KEY}".encode()}).status_code == 401
    assert compared == [(KEY.encode(), KEY.encode())]


STRANGERS = ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0", "127.0.0.2"]
STRANGERS += ["localhost.", "", "[::2]", "[::1", "127.0.0.1, evil.example", "localhost evil.example", "2130706433"]


def test_other_names_of_this_machine_are_not_answered_for(here: Running) -> None:
    with quiet_log(), httpx.Client() as client:
        for host in STRANGERS:
            found = client.get(f"{here.url}/v1/models", headers={"Host": host})
            assert found.status_code == 400, host
            assert check_error(400, found.headers, found.content, ("evil",)) in (
                "host_not_allowed",
                "malformed_request",
            )
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", f"127.0.0.1:{port_of(here)}"):
            assert client.get(f"{here.url}/v1/models", headers={"Host": host}).status_code == 200


def test_other_origins_are_refused(here: Running) -> None:
    own = f"127.0.0.1:{port_of(here)}"
    wrong = ["http://evil.example", "null", "", "http://[", "http://127.0.0.1", f"http://{own}.evil.example", "file://"]
    wrong += [
        f"http://evil.example@{own}",
        f"http://{own}@evil.example",
        f"{own}",
        "http://\xe9",
        "http://\u2100".encode().decode("latin-1"),
    ]
    with quiet_log(), httpx.Client() as client:
        for origin in wrong:
            for method in ("GET", "POST", "OPTIONS"):
                headers = {b"Origin": origin.encode("latin-1")}
                found = client.request(method, f"{here.url}/v1/chat/completions", headers=headers, json=CHAT)
                assert found.status_code == 403 and "access-control-allow-origin" not in found.headers, origin
                assert check_error(403, found.headers, found.content, ("evil",)) == "origin_not_allowed"
        assert httpx.post(f"{here.url}/v1/chat/completions", headers={"Origin": f"http://{own}"}, json=CHAT).is_success


def smuggled(here: Running) -> dict[str, bytes]:
    """Requests that two servers in a row could take for different ones."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    zero = b"0\r\n\r\n" + hidden
    return {
        "two lengths": head(here, Content_Length="3\r\nContent-Length: 4") + b"{} " + hidden,
        "a list of lengths": head(here, Content_Length="2, 3") + b"{} " + hidden,
        "a length with a sign": head(here, Content_Length="+3") + b"{} ",
        "a length that is none": head(here, Content_Length="0x3") + b"{} ",
        "a length of 5,000 digits": head(here, Content_Length="9" * 5000),
        "a length of 20 digits": head(here, Content_Length="9" * 20),
        "another coding": head(here, Transfer_Encoding="gzip, chunked") + zero,
        "chunked twice": head(here, Transfer_Encoding="chunked, chunked") + zero,
        "chunked, with a tab": head(here, Transfer_Encoding="\tchunked\x0b") + zero,
        "a space before the colon": head(here).replace(b"Host:", b"Host :"),
        "a folded header": head(here, X="a\r\n Content-Length: 3"),
        "two hosts": head(here, X="a\r\nHost: evil.example"),
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "bare line feeds and two lengths": head(here, X="a\nContent-Length: 3", Content_Length="4") + b"{}  ",
        "a bad chunk": head(here, Transfer_Encoding="chunked") + b"-3\r\n{} \r\n0\r\n\r\n",
        "a chunk of 2**64": head(here, Transfer_Encoding="chunked") + b"1" + b"0" * 30 + b"\r\n",
        "a header of 64 KB": head(here, "GET /health", X="a" * 300_000),
        "10,000 headers": head(here, "GET /health").replace(b"\r\n\r\n", b"\r\n" + b"a: b\r\n" * 50_000 + b"\r\n"),
        "a path of 300 KB": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }


def test_smuggled_requests_and_header_bombs(here: Running) -> None:
    with quiet_log():
        for name, data in smuggled(here).items():
            with opened(here) as connection:
                try:
                    connection.sendall(data)
                except ConnectionError:
                    continue  # it was refused before its end
                found = answer(connection)
                assert found is None or 400 <= found[0] < 500, name
                if found is not None:
                    check_error(*found)
        assert within(5, lambda: idle(here))


def test_a_length_beside_chunks_does_not_count(here: Running) -> None:
    """RFC 9112, 6.3: chunks win; what follows them would be a request of its own, and the length hides none of it."""
    body = whole(here).partition(b"\r\n\r\n")[2]
    data = head(here, Transfer_Encoding="chunked", Content_Length="3")
    with opened(here) as connection:
        connection.sendall(data + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
        found = answer(connection)
        assert found is not None and found[0] in (200, 400)


def test_broken_chunks_behind_an_answer_end_the_connection(here: Running) -> None:
    with quiet_log(), opened(here) as connection:
        connection.sendall(head(here, "GET /health", Transfer_Encoding="chunked"))
        found = answer(connection)
        assert found is not None and found[0] == 200
        connection.sendall(b"zz\r\n")
        assert connection.recv(1) == b""


def test_expect_100_continue(here: Running) -> None:
    with opened(here) as connection:
        connection.sendall(
            head(here, Content_Length=str(len(whole(here).partition(b"\r\n\r\n")[2])), Expect="100-continue")
        )
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(whole(here).partition(b"\r\n\r\n")[2])
        found = answer(connection)
        assert found is not None and found[0] == 200
    with opened(here) as connection:  # refused by its head alone, the body is not even asked for
        connection.sendall(head(here, Content_Length="99999999", Expect="100-continue"))
        found = answer(connection)
        assert found is not None and check_error(*found) == "body_too_large"


def test_pages_are_given_whole(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("page")
    monkeypatch.setattr("mm.serve.app.PAGE", tmp_path)
    with running(plain) as here, httpx.Client(base_url=here.url) as client, quiet_log():
        for path in ("/", "/page/index.html"):
            for wanted in ("bytes=99-", "bytes=x", "bytes=0-0,1-1,1-1", "bytes=2-1"):
                found = client.get(path, headers={"Range": wanted})
                assert (found.status_code, found.text) == (200, "page")
        for name in ("%00", "..%2findex.html", "..%2f..%2fetc/passwd", "", "a" * 5000):
            path = f"/page/{name}"
            found = client.get(path)
            assert check_error(found.status_code, found.headers, found.content) == "not_found"
