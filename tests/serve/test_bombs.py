"""What asks for much is refused, by the code that it deserves, and costs the server next to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm.serve.body import parse_json
from mm.serve.fetch import fetch
from mm.serve.limits import MediaLimits, Refused, check_items
from mm.serve.media import MediaDecoder

from .bombs import BODIES, BOMBS, frame_list, large_url

GROWTH = 64 * 2**20  # bytes
LIMITS = MediaLimits()


@contextmanager
def bounded() -> Iterator[None]:
    """Fails if this process has ever held GROWTH more inside the block than before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    yield
    assert _status("VmHWM") - before < GROWTH


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def test_the_measure_measures() -> None:
    with pytest.raises(AssertionError), bounded():
        bytes(b"x" * (GROWTH + 2**22))


@pytest.mark.parametrize("share", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_50_files_are_refused(decoder: MediaDecoder, share: int) -> None:
    """All of them take a while; by default every sixth."""
    assert len(BOMBS) >= 50
    bombs, found = BOMBS[::share], {}
    for name, kind, _, make in bombs:
        data = make()
        with bounded(), pytest.raises(Refused) as caught:
            decoder.open(kind, data)
        found[name] = caught.value.code
    assert found == {name: code for name, _, code, _ in bombs}


@pytest.mark.parametrize(("name", "code", "make"), BODIES, ids=[name for name, *_ in BODIES])
def test_bodies_are_refused(name: str, code: str, make: Callable[[], bytes]) -> None:
    body = make()
    with bounded(), pytest.raises(Refused) as caught:
        parse_json(body, LIMITS)
    assert caught.value.code == code and len(caught.value.detail) <= 500


def test_base64_of_too_much_is_not_decoded() -> None:
    url = large_url()
    with bounded(), pytest.raises(Refused, match="media_too_large"):
        fetch(url, LIMITS, "image")


def test_lists_of_frames_are_counted() -> None:
    body = frame_list(10_000)
    with bounded():
        frames = parse_json(body, LIMITS)["video"]
        with pytest.raises(Refused, match="too_many_items"):
            check_items(len(frames), LIMITS)
    with pytest.raises(Refused, match="too_many_items"):
        parse_json(frame_list(100_000), LIMITS)
    check_items(LIMITS.items, LIMITS)


def test_what_is_within_the_limits_is_read() -> None:
    whole = {"a": [1, -2.5, True, None, "é😀\x00"], "deep": json.loads("[" * 62 + "]" * 62), "b" * 10: 10**30}
    assert parse_json(json.dumps(whole).encode(), LIMITS) == whole
    assert parse_json(bytearray(json.dumps(whole, ensure_ascii=False).encode()), LIMITS) == whole


def test_a_large_picture_in_json_takes_little_more_than_itself() -> None:
    body = json.dumps({"text": "😀", "url": "a" * 20_000_000}, ensure_ascii=False).encode()
    with bounded():  # as text of four bytes a letter it would take 80 MB
        assert len(parse_json(body, LIMITS)["url"]) == 20_000_000
