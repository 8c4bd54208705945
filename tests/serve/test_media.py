"""Media are decoded in processes of their own, to the very tokens that the model's process would have made."""

from __future__ import annotations

import io
import os
import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mm.datasets.decode import decode
from mm.datasets.processor import Processor
from mm.serve.limits import MediaLimits, Refused
from mm.serve.media import MediaDecoder
from mm.testing import tiny_model
from mm.types import Kind, Media, MediaError, MediaSpec, Sample

from .files import harmless, picture, png, sound, zeros

MODEL = tiny_model()
FILES = list(harmless())


def refused(decoder: MediaDecoder, kind: Kind, data: bytes, declared: str | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        decoder.open(kind, data, declared)
    return caught.value


@pytest.mark.parametrize(("form", "kind", "data"), FILES, ids=[f"{form} {kind}" for form, kind, _ in FILES])
def test_the_tokens_are_those_of_the_models_own_process(
    decoder: MediaDecoder, form: str, kind: Kind, data: bytes
) -> None:
    media = decoder.open(kind, data)
    assert media.kind == kind and media.data == b"" and media.tokens is not None
    tokenizer: Any = MODEL.media_specs()[kind].tokenizer
    direct = tokenizer(decode(Media(kind, data, "a"), resizer=tokenizer if kind == "image" else None))
    for name in ("values", "positions", "mask", "grid"):
        assert torch.equal(getattr(media.tokens, name), getattr(direct, name)), name


def test_a_prompt_is_encoded_the_same(decoder: MediaDecoder) -> None:
    kinds = ("image", "audio", "video")
    plain = [Media(kind, next(data for _, other, data in FILES if other == kind), kind) for kind in kinds]
    parts = [{"type": kind, "media": index} for index, kind in enumerate(kinds)]
    sample = Sample("a", [{"role": "user", "content": [*parts, {"type": "text", "text": "how many?"}]}], plain)
    opened = replace(
        sample, media=[decoder.open(item.kind, item.data) for item in plain if isinstance(item.data, bytes)]
    )
    processor = Processor(MODEL.tokenizer, MODEL.template, MODEL.media_specs())
    one, two = (processor.encode(each, generation_prompt=True) for each in (sample, opened))
    assert torch.equal(one.ids, two.ids) and one.length == two.length
    for mine, other in zip(one.media, two.media, strict=True):
        assert (mine.column, mine.length) == (other.column, other.length)
        assert torch.equal(mine.tokens.values, other.tokens.values)


def test_the_models_process_cannot_decode_what_was_sent(decoder: MediaDecoder) -> None:
    with pytest.raises(MediaError, match="empty"):
        decode(decoder.open("image", picture()))


def test_media_are_named_after_their_content(decoder: MediaDecoder) -> None:
    one, same, other = (decoder.open("image", data) for data in (picture(), picture(), picture("GIF")))
    assert one == same != other


@pytest.mark.parametrize(
    ("kind", "declared", "fine"),
    [
        ("image", "image/png", True),
        ("image", "image/jpeg; q=1", True),  # another format of the same kind
        ("image", "", True),
        ("image", "application/octet-stream", True),
        ("image", "audio/wav", False),
        ("image", "text/html", False),
        ("image", "image", True),
        ("image", "png", False),
    ],
)
def test_the_declared_type_speaks_of_the_kind(decoder: MediaDecoder, kind: Kind, declared: str, fine: bool) -> None:
    if fine:
        decoder.open(kind, picture(), declared)
    else:
        assert refused(decoder, kind, picture(), declared).code == "unsupported_media_type"


def test_what_the_model_does_not_take_is_refused(decoder: MediaDecoder) -> None:
    assert refused(decoder, "audio", sound(seconds=31)).code == "media_unsuitable"  # its tokenizer's max_seconds is 30
    assert refused(decoder, "audio", picture()).code == "unsupported_media_type"


def test_the_largest_picture_is_taken(decoder: MediaDecoder) -> None:
    limits = decoder.limits
    file = io.BytesIO()
    Image.new("RGB", (limits.image_side, limits.image_pixels // limits.image_side), "red").save(file, "JPEG")
    assert decoder.open("image", file.getvalue()).tokens is not None


def test_many_threads_at_once(decoder: MediaDecoder) -> None:
    with ThreadPoolExecutor(8) as pool:
        files = [(kind, data) for _, kind, data in FILES] * 2 + [("image", b"\x89PNG\r\n\x1a\nnonsense")] * 8
        found = list(pool.map(lambda file: _tokens(decoder, *file), files))
    assert found[: len(FILES)] == found[len(FILES) : 2 * len(FILES)]
    assert found[2 * len(FILES) :] == ["media_unreadable"] * 8
    for _ in range(200):
        if not _children(_nursery(decoder)):
            return
        time.sleep(0.05)
    raise AssertionError("children were left")


def _tokens(decoder: MediaDecoder, kind: Kind, data: bytes) -> Any:
    try:
        tokens = decoder.open(kind, data).tokens
    except Refused as error:
        return error.code
    assert tokens is not None
    return tokens.values.tolist()


def _nursery(decoder: MediaDecoder) -> int:
    nursery = decoder._nursery
    assert nursery is not None
    return nursery._process.pid


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# A tokenizer whose child does what the size of a square picture says: a file cannot be made to hang for sure.
ODD = """
    import os, socket, time
    import torch
    from mm.tokenizers.image import ImageTokenizer

    class Odd(ImageTokenizer):
        def __call__(self, media):
            side = media.shape[-1]
            if side == 41:
                time.sleep(600)
            if side == 42:
                while True: pass
            if side == 43:
                os.kill(os.getpid(), 11)  # refused by the walls: a PermissionError, not a death
            if side == 44:
                os.write(1, b""); os.abort()
            if side == 45:
                socket.create_connection(("127.0.0.1", 9))
            if side == 46:
                open("/etc/passwd").read()
            if side == 47:
                open("/dev/shm/mm-evil", "w")
            if side == 48:
                os.fork()
            if side == 49:
                torch.ones(2**30)
            if side == 50:
                bytearray(2**34)
            if side == 51:
                return super().__call__(media).with_values(torch.full((1, 3), 1))
            if side == 52:
                print("noise", file=__import__("sys").stderr)
            return super().__call__(media)

        def size_for(self, height, width):
            return height, width  # pictures come as they are
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MediaDecoder]:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_tokenizer.py").write_text(textwrap.dedent(ODD))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import odd_tokenizer  # type: ignore[import-not-found]

        limits = MediaLimits(decode_seconds=3, decode_memory=2**27)
        specs = {"image": MediaSpec(odd_tokenizer.Odd(patch=2, max_tokens=16))}
        with MediaDecoder(specs, limits, children=1) as decoder:
            decoder.wait()
            yield decoder


def works(decoder: MediaDecoder) -> None:
    assert decoder.open("image", picture(side=20)).tokens is not None


@pytest.mark.parametrize("side", [41, 42])
def test_a_decoder_that_hangs_is_ended(odd: MediaDecoder, side: int) -> None:
    start = time.monotonic()
    error = refused(odd, "image", picture(side=side))
    assert error.code == "decoding_timeout" and error.status == 422
    assert time.monotonic() - start < 3 * 3
    works(odd)


def _lives(process: int) -> bool:
    """One that has ended stands in /proc until its parent, here the system's first process, gets round to it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status


@contextmanager
def at_work(decoder: MediaDecoder) -> Iterator[tuple[int, list[int]]]:
    """While a child hangs: the nursery and its children. Its request then fails, by that name."""
    while _children(_nursery(decoder)):  # the last one's end
        time.sleep(0.01)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(refused(decoder, "image", picture(side=41)).code))
    thread.start()
    while not (children := _children(_nursery(decoder))):
        time.sleep(0.01)
    time.sleep(0.1)
    yield _nursery(decoder), children
    thread.join()
    assert found == ["decoding_failed"]


def test_a_child_killed_mid_request_fails_that_request_alone(odd: MediaDecoder) -> None:
    with at_work(odd) as (_, children):
        for child in children:
            os.kill(child, signal.SIGKILL)
    works(odd)


def test_a_nursery_that_is_killed_is_replaced(odd: MediaDecoder) -> None:
    with at_work(odd) as (nursery, children):
        os.kill(nursery, signal.SIGKILL)
    works(odd)
    assert _nursery(odd) != nursery and not any(_lives(child) for child in children)


@pytest.mark.parametrize("side", [43, 44, 45, 46, 47, 48, 51])
def test_a_decoder_that_was_taken_over_reaches_nothing(odd: MediaDecoder, side: int) -> None:
    error = refused(odd, "image", picture(side=side))
    assert error.code == "decoding_failed"
    assert ("PermissionError" in error.detail) == (side in (43, 45, 46, 47, 48))
    assert not Path("/dev/shm/mm-evil").exists()
    works(odd)


@pytest.mark.parametrize("side", [49, 50])
def test_memory_is_bounded(odd: MediaDecoder, side: int) -> None:
    assert refused(odd, "image", picture(side=side)).code == "media_too_large"
    works(odd)


def test_a_picture_that_needs_more_memory_than_allowed(odd: MediaDecoder) -> None:
    assert refused(odd, "image", png(8_000, 8_000, zeros(1_000), 16, 6)).code == "media_too_large"
    works(odd)


def test_one_that_waits_too_long_is_told_so(odd: MediaDecoder) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: refused(odd, "image", picture(side=41)).code, range(3)))
    assert sorted(found)[-1] == "decoding_timeout" and "decoder_busy" in found


def test_codecs_write_nothing_on_the_servers_terminal(odd: MediaDecoder, capfd: pytest.CaptureFixture[str]) -> None:
    odd.open("image", picture(side=52))
    assert capfd.readouterr() == ("", "")


def test_a_closed_decoder_says_so(odd: MediaDecoder) -> None:
    process = _nursery(odd)
    odd.close()
    with pytest.raises(RuntimeError, match="closed"):
        odd.open("image", picture())
    assert not Path(f"/proc/{process}").exists()
    odd.close()
    with pytest.raises(ValueError, match="children=0"):
        MediaDecoder({}, children=0)


def test_a_decoder_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with MediaDecoder({}) as decoder, pytest.raises(RuntimeError, match="ended while it started"):
        decoder.wait()
