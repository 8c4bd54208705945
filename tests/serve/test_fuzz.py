"""Whatever is sent, the answer is what was asked for or Refused: nothing else is ever raised."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.serve.address import is_public, read_url
from mm.serve.body import decode_base64, parse_json
from mm.serve.fetch import Network, fetch
from mm.serve.formats import check_format
from mm.serve.limits import MediaLimits, Refused
from mm.serve.media import MediaDecoder
from mm.types import KINDS

from .files import harmless

LIMITS = MediaLimits(hosts=("images.example",), json_depth=4, json_values=50)
PIECES = [
    "http",
    "https",
    "data",
    "file",
    ":",
    "/",
    "//",
    "@",
    "images.example",
    "127.0.0.1",
    "[::1]",
    "%",
    "#",
    "?",
    "\\",
    "\n",
]
PIECES += ["base64", ";", ",", "image/png", "AAAA", "=", ":80", ":22", "é", "\x00", " "]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_url(url: str) -> None:
    """Of all that may be spelled, only the allowed name is ever looked up."""

    def resolve(host: str, port: int) -> list[str]:
        assert host == "images.example" and port in (80, 443)
        return ["127.0.0.1"]

    def connect(*_: Any) -> Any:
        raise AssertionError("connected")

    with contextlib.suppress(Refused):
        assert read_url(url, LIMITS).host == "images.example"
    with contextlib.suppress(Refused):
        assert isinstance(fetch(url, LIMITS, "image", Network(resolve, connect)), bytes)
    with contextlib.suppress(Refused):
        assert len(decode_base64(url, 100)) <= 100
    assert isinstance(is_public(url), bool)


@given(st.one_of(st.binary(), st.text(alphabet='[]{}",:0e1-+.\\untrfals é').map(str.encode)))
def test_any_body(body: bytes) -> None:
    with contextlib.suppress(Refused):
        assert parse_json(body, LIMITS) == json.loads(body)
    for kind in KINDS:
        with contextlib.suppress(Refused):
            check_format(kind, body)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, or a piece cut out, doubled or moved; the first ones stay, which say what it is."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 10, 50])):
        changed[draw.randrange(16, len(changed))] = draw.choice([0, 0xFF, draw.randrange(256)])
    start, end = sorted(draw.randrange(16, len(changed)) for _ in range(2))
    match draw.randrange(4):
        case 0:
            del changed[start:end]
        case 1:
            changed[start:start] = changed[start:end]
        case 2:
            changed = changed[: end + 1]
    return bytes(changed)


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_damaged_files(decoder: MediaDecoder, rounds: int) -> None:
    draw, found, files = random.Random(0), [], list(harmless())
    for _ in range(rounds):
        for _, kind, data in files:
            try:
                tokens = decoder.open(kind, damaged(data, draw)).tokens
                assert tokens is not None and len(tokens)
                found.append("read")
            except Refused as error:
                found.append(error.code)
    assert {"read", "media_unreadable"} <= set(found)
    assert "decoding_timeout" not in found and "decoder_busy" not in found
