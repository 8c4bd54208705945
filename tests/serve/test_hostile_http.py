"""Whatever is sent, what comes back is an answer or an error of the one form, and the log shows no failure."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.serve.limits import ServeLimits
from mm.serve.run import Running, running
from mm.testing import tiny_model

from .attack import CHAT, answer, check_error, idle, opened, quiet_log, within
from .files import picture

MARK = "nobody-shall-hear-this"
KEY = "a-key"
LIMITS = ServeLimits(max_length=128, cache_tokens=2048, answer_tokens=4, deadline_seconds=20, header_seconds=2)
PIXELS = "data:image/png;base64," + base64.b64encode(picture(side=4)).decode()
MESSAGE = {"role": "user", "content": [{"type": "text", "text": "what?"}]}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
FORMS: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        CHAT,
        CHAT | {"messages": [MESSAGE], "stream": True, "stream_options": {"include_usage": True}, "n": 2, "seed": 1},
        CHAT | {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "stop": ["a"], "presence_penalty": 1},
        CHAT | {"logprobs": True, "top_logprobs": 2, "thinking": True, "thinking_budget": 1, "frequency_penalty": 1},
        CHAT | {"tools": [TOOL], "tool_choice": "auto", "repetition_penalty": 1.5, "metadata": {"a": "b"}},
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "number"}}}},
        CHAT
        | {
            "messages": [
                {"role": "system", "content": "be"},
                MESSAGE,
                {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "so"},
                {"role": "tool", "content": "1", "tool_call_id": "a"},
            ]
        },
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXELS}}]}]},
    ],
    "/v1/completions": [
        {"model": "model", "prompt": "what", "max_tokens": 2},
        {"model": "model", "prompt": [[1, 2], [3]], "max_tokens": 0, "echo": True, "logprobs": 2, "n": 1},
        {"model": "model", "prompt": ["a", "b"], "max_tokens": 2, "stream": True, "stop": "e", "seed": 3},
    ],
    "/v1/embeddings": [
        {"model": "model", "input": "what", "encoding_format": "float"},
        {"model": "model", "input": ["a", {"type": "text", "text": "b"}], "encoding_format": "base64", "dimensions": 8},
    ],
    "/v1/explain": [{"model": "model", "messages": [MESSAGE], "answer": "two"}],
}
FILE = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    + picture(side=4)
    + b"\r\n--b--\r\n"
)
PATHS = [
    *FORMS,
    "/v1/files",
    "/v1/files/file-1",
    "/v1/models",
    "/v1/models/model",
    "/v1/settings",
    "/health",
    "/metrics",
]
ODD_PATHS = [
    "/v1",
    "/v1/",
    "/v1/completions/",
    "//",
    "/v1/files/",
    "/health/..",
    "/%00",
    "/v1/models/%ff",
    "/.env",
    "*",
]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "get", "X"]
TYPES = ["application/json", "Application/JSON; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", ""]
TYPES += [
    "multipart/form-data; boundary=b",
    "multipart/form-data",
    "application/json/json",
    "text/html, application/json",
]

NUMBERS = [0, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, -1e308, 5e-324, 1e-40, float("nan"), float("inf")]
STRINGS = [MARK, "\ud800", "\udfff\ud800", "\x00", "", "a" * 5000, "<|im_start|>", "😀", "data:,", "http://127.0.0.1/"]
STRINGS += [
    PIXELS,
    PIXELS[:-9],
    "data:image/png;base64,AAAA",
    "file-1",
    "NaN",
    "[" * 5000,
    '{"a": "\\ud800"}',
    "9" * 5000,
]
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(NUMBERS), st.sampled_from(STRINGS)
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just(MARK), inner, max_size=4)
)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*here, key)
        yield from places(inner, (*here, key))


@st.composite
def forms(draw: Any) -> tuple[str, Any]:
    """A route and a form of its, of which some places hold something else, or more, or nothing."""
    path = draw(st.sampled_from(sorted(FORMS)))
    form = json.loads(json.dumps(draw(st.sampled_from(FORMS[path]))))
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from(list(places(form)) or [("model",)]))
        inner = form
        for step in way:
            inner = inner[step]
        change = draw(st.sampled_from(["put", "put", "put", "drop", "add", "wrap"]))
        if change == "put":
            inner[last] = draw(values)
        elif change == "wrap":
            inner[last] = [inner[last]]
        elif change == "add" and isinstance(inner, dict):
            inner[draw(st.text(max_size=9) | st.sampled_from(["logit_bias", "functions", "__class__"]))] = draw(values)
        elif isinstance(inner, dict):
            inner.pop(last, None)
    return path, draw(values) if draw(st.integers(0, 30)) == 0 else form


@st.composite
def changed(draw: Any, data: bytes) -> bytes:
    """Some bytes are others, and a piece may be gone or twice there."""
    found = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        found[draw(st.integers(0, len(found) - 1))] = draw(st.integers(0, 255))
    start, end = sorted((draw(st.integers(0, len(found))), draw(st.integers(0, len(found)))))
    piece = draw(st.sampled_from([bytes(found[start:end]), bytes(found[start:end]) * 2, b"", None]))
    return bytes(found if piece is None else found[:start] + piece + found[end:])


def bodies() -> Any:
    as_json = forms().map(lambda each: (*each[:1], json.dumps(each[1]).encode(), "application/json"))
    as_text = forms().map(lambda each: (each[0], json.dumps(each[1]).encode()))
    broken = as_text.flatmap(lambda each: st.tuples(st.just(each[0]), changed(each[1]), st.just("application/json")))
    deep = st.sampled_from(
        [b"[" * 70, b'{"a":' * 300, b"[" * 99_000, b"\xff\xfe{\x00}\x00", b'"\\ud800"', b"1e999", b""]
    )
    odd = st.tuples(st.sampled_from(PATHS), deep | st.binary(), st.sampled_from(TYPES))
    files = st.tuples(st.just("/v1/files"), st.just(FILE) | changed(FILE), st.just(TYPES[5]) | st.sampled_from(TYPES))
    return st.one_of(as_json, as_json, as_json, broken, odd, files)


def lines() -> Any:
    """Methods and paths."""
    paths = (
        st.sampled_from(PATHS) | st.sampled_from(ODD_PATHS) | st.text(max_size=20).map(lambda text: f"/{text}{MARK}")
    )
    return st.tuples(st.sampled_from(METHODS), paths)


def raw() -> Any:
    """Bytes that are HTTP, or nearly, or not at all."""
    text = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\nOrigin: http://127.0.0.1\r\nAuthorization: Basic YTpi\r\n\r\n"
        b"3\r\n{} \r\n0\r\n\r\n"
    )
    return st.one_of(
        st.binary(min_size=1), changed(text), changed(text), changed(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    )


class Fuzz:
    """Sends what was drawn, checks what comes back, and counts both."""

    def __init__(self, here: Running) -> None:
        self._here, self.client = here, httpx.Client(base_url=here.url, timeout=60)
        self.statuses, self.codes = Counter[int](), Counter[str]()

    def body(self, drawn: tuple[str, bytes, str]) -> None:
        path, body, declared = drawn
        self.check(self.client.post(path, content=body, headers={"Content-Type": declared}))

    def line(self, drawn: tuple[str, str]) -> None:
        with contextlib.suppress(httpx.InvalidURL):  # what no client would send
            self.check(self.client.request(drawn[0], drawn[1]))

    def raw(self, drawn: bytes) -> None:
        with opened(self._here) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(drawn)
            connection.shutdown(socket.SHUT_WR)
            found = answer(connection)
            self.count(0 if found is None else found[0])
            if found is not None and found[0] >= 400:
                self.codes[check_error(*found, (MARK,))] += 1

    def check(self, response: httpx.Response) -> None:
        self.count(response.status_code)
        if response.status_code >= 400 and response.request.method != "HEAD":
            self.codes[check_error(response.status_code, response.headers, response.content, (MARK,))] += 1
        elif response.headers.get("content-type", "").startswith("text/event-stream"):
            *events, last, empty = response.text.split("\n\n")
            assert (last, empty) == ("data: [DONE]", "")
            for event in events:
                told = json.loads(event.removeprefix("data: "))
                if "error" in told:
                    status = {"invalid_schema": 400}[told["error"]["code"]]
                    headers = {**response.headers, "content-type": "application/json"}
                    check_error(status, headers, json.dumps(told).encode())

    def count(self, status: int) -> None:
        self.statuses[status] += 1
        # 0: half of a request, ended by its client, is not answered
        assert status == 0 or 200 <= status < 300 or 400 <= status < 500, status


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with running(tiny_model(embedding_dim=8).eval(), limits=LIMITS) as here:
        yield here


@pytest.mark.parametrize("count", [240, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_request(here: Running, count: int, tell: Callable[[str], None]) -> None:
    fuzz, start = Fuzz(here), time.monotonic()
    every: list[HealthCheck] = list(HealthCheck)  # pyright: ignore[reportAssignmentType]
    quietly = settings(deadline=None, database=None, derandomize=True, suppress_health_check=every)
    with quiet_log():
        # Of lines, some are none that a client could send; of raw bytes, some are half a request.
        for strategy, send, share in ((bodies(), fuzz.body, 0.7), (lines(), fuzz.line, 0.3), (raw(), fuzz.raw, 0.3)):
            settings(quietly, max_examples=round(share * count))(given(strategy)(send))()
        assert within(10, lambda: idle(here))
    counts = f"{dict(fuzz.statuses)} {dict(fuzz.codes)}"
    tell(f"{fuzz.statuses.total():,} requests in {time.monotonic() - start:.0f} s: {counts}")
    assert fuzz.statuses.total() >= count and fuzz.statuses[200] > count / 20
    assert here.server.worker.alive and fuzz.client.get("/health").status_code == 200
