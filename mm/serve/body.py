"""What strangers send as JSON and base64, bounded before it is expanded."""

from __future__ import annotations

import base64
import math
import re
from typing import Any

from mm.serve.limits import MediaLimits, Refused

_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def parse_json(body: bytes | bytearray, limits: MediaLimits) -> Any:
    """A JSON text in UTF-8 -> dicts, lists, strings, finite numbers, booleans, None.

    Raises Refused for more than body_bytes, json_depth or json_values, and for what is not JSON: NaN and half
    surrogates too, which Python's own parser lets through.
    """
    from pydantic_core import from_json  # reads bytes without a copy, and never recurses deeper than 200

    if len(body) > limits.body_bytes:
        raise Refused("body_too_large", f"{len(body):,} bytes of JSON, more than {limits.body_bytes:,}")
    # What could become a value of its own: an empty list takes 3 bytes of text and 60 of memory. Those in strings are
    # counted too; no text that a model reads has so many.
    values = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if values > limits.json_values:
        raise Refused("too_many_items", f"about {values:,} JSON values, more than {limits.json_values:,}")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        code = "too_deep" if "recursion limit" in str(error) else "malformed_json"
        raise Refused(code, str(error)) from None
    _check_values(value, limits)
    return value


def _check_values(root: Any, limits: MediaLimits) -> None:
    level, depth = [root], 0
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise Refused("malformed_json", "a number too large for 64 bits")  # 1e999
            if isinstance(value, (dict, list)):
                inner += value.values() if isinstance(value, dict) else value
                if depth == limits.json_depth:
                    raise Refused("too_deep", f"JSON nested deeper than {limits.json_depth}")
        level, depth = inner, depth + 1


def decode_base64(text: str, limit: int) -> bytes:
    """The standard alphabet with its padding, nothing else. Raises Refused beyond `limit` bytes, before decoding."""
    if len(text) > 4 * -(-limit // 3):
        raise Refused("media_too_large", f"{len(text):,} characters of base64, more than {limit:,} bytes")
    if len(text) % 4 or not _BASE64.fullmatch(text):  # Python's own check lets some padding pass
        raise Refused("malformed_base64", f"{len(text):,} characters that are not base64")
    data = base64.b64decode(text)
    if len(data) > limit:
        raise Refused("media_too_large", f"{len(data):,} bytes, more than {limit:,}")
    return data
