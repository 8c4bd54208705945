"""Small files that ask for much, and bodies that do: each with the code that it is refused by."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import av
import numpy as np

from .files import chunk, film, picture, png, sound, track, zeros

Bomb = tuple[str, Any, str, Callable[[], bytes]]  # name, kind, code, file
LARGE, BROKEN, TYPE = "media_too_large", "media_unreadable", "unsupported_media_type"


def copies(form: str, codec: str, count: int, step: int) -> bytes:
    """A film of one frame, shown `count` times, `step` tenths of a second apart."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        frame.pts = 0
        first = [*stream.encode(frame), *stream.encode()][0]
        data, unit = bytes(first), round(1 / (first.time_base * 10))
        for number in range(count):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, first.time_base, True
            packet.pts = packet.dts = number * step * unit
            container.mux(packet)
    return file.getvalue()


def jpeg(width: int, height: int) -> bytes:
    """One whose header says that it is so large."""
    data = picture("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif(width: int, height: int, frames: int = 1) -> bytes:
    """Frames of one pixel on a screen of that size."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return screen + frame * frames + b"\x3b"


def large_gif(side: int) -> bytes:
    """One frame of side x side pixels, of which the data hold few."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    return screen + b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00\x3b"


def webp(kind: bytes, data: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int) -> bytes:
    """An animated WebP's header, followed by nothing but an empty frame."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    whole = webp(b"VP8X", bytes([0x02, 0, 0, 0]) + size)
    parts = whole[8:] + b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", 16) + bytes(16)
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


def lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + bytes(32))


def wav(rate: int, channels: int, declared: int, data: bytes) -> bytes:
    """8-bit samples, of a length that need not be that of `data`."""
    form = struct.pack("<HHIIHH", 1, channels, rate, min(rate * channels, 2**32 - 1), channels, 8)
    parts = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", declared) + data
    return b"RIFF" + struct.pack("<I", min(declared + 36, 2**32 - 1)) + parts


def grown() -> bytes:
    """A film whose frames are larger than it says."""
    data = film("webm", "libvpx", frames=1)
    at = data.index(b"\x9d\x01\x2a") + 3  # of a VP8 key frame
    return data[:at] + struct.pack("<HH", 16_383, 16_383) + data[at + 4 :]


def texts(count: int, each: int) -> bytes:
    return chunk(b"zTXt", b"Comment\0\0" + zeros(each)) * count


BOMBS: list[Bomb] = [
    ("png: 100,000 pixels a side", "image", LARGE, lambda: png(100_000, 100_000, zeros(10**6))),
    ("png: 2**31 - 1 pixels a side", "image", LARGE, lambda: png(2**31 - 1, 2**31 - 1, b"")),
    ("png: no pixels", "image", BROKEN, lambda: png(0, 0, b"")),
    (
        "png: 30,000 a side, all there, one bit a pixel",
        "image",
        LARGE,
        lambda: png(30_000, 30_000, zeros(112_530_000), 1),
    ),
    ("png: 8,001 by 1", "image", LARGE, lambda: png(8_001, 1, zeros(8_002))),
    ("png: 1 by 8,001", "image", LARGE, lambda: png(1, 8_001, zeros(16_002))),
    ("png: 16 bits, four colours, 8,001 a side", "image", LARGE, lambda: png(8_001, 8_001, b"", 16, 6)),
    ("png: 8,000 a side, no data", "image", BROKEN, lambda: png(8_000, 8_000, b"")),
    ("png: a text of 20 MB", "image", BROKEN, lambda: png(8, 8, zeros(72), before=texts(1, 20_000_000))),
    ("png: 100 texts of 1 MB", "image", BROKEN, lambda: png(8, 8, zeros(72), before=texts(100, 1_000_000))),
    (
        "png: 2,000 frames",
        "image",
        LARGE,
        lambda: png(8, 8, zeros(72), before=chunk(b"acTL", struct.pack(">II", 2_000, 0))),
    ),
    ("png: 11 MB", "image", LARGE, lambda: png(8, 8, bytes(11_000_000))),
    ("jpeg: 65,535 a side", "image", LARGE, lambda: jpeg(65_535, 65_535)),
    ("jpeg: 8,001 by 32", "image", LARGE, lambda: jpeg(8_001, 32)),
    ("jpeg: 8,000 a side, data of 32", "image", BROKEN, lambda: jpeg(8_000, 8_000)[:-2]),
    ("gif: 65,535 a side", "image", LARGE, lambda: gif(65_535, 65_535)),
    ("gif: 8,001 by 1", "image", LARGE, lambda: gif(8_001, 1)),
    ("gif: 100,000 frames", "image", LARGE, lambda: gif(8, 8, 100_000)),
    ("gif: 1,001 frames", "image", LARGE, lambda: gif(8, 8, 1_001)),
    ("gif: a frame of 65,535 a side", "image", LARGE, lambda: large_gif(65_535)),
    ("gif: 7,999 a side, one pixel there", "image", BROKEN, lambda: large_gif(7_999)),
    ("webp: a canvas of 16,384 a side", "image", LARGE, lambda: canvas(16_384, 16_384)),
    ("webp: a canvas of 2**24 a side", "image", LARGE, lambda: canvas(2**24, 2**24)),
    ("webp: lossless, 16,383 a side", "image", LARGE, lambda: lossless(16_383, 16_383)),
    ("webp: lossless, 8,000 a side, no data", "image", BROKEN, lambda: lossless(8_000, 8_000)),
    ("webp: 1,001 frames", "image", LARGE, lambda: picture("WebP", side=4, frames=1_001, minimize_size=False)),
    ("webp: 8,001 by 1", "image", LARGE, lambda: lossless(8_001, 1)),
    ("wav: 50 minutes", "audio", LARGE, lambda: wav(8_000, 1, 24_000_000, bytes(24_000_000))),
    ("wav: 4 GB declared", "audio", BROKEN, lambda: wav(8_000, 1, 2**31 - 100, bytes(100))),
    ("wav: 1,000 channels", "audio", BROKEN, lambda: wav(1_000_000, 1_000, 2**31 - 1000, bytes(1_000_000))),
    ("wav: 1 sample a second", "audio", "media_unsuitable", lambda: wav(1, 1, 100, bytes(100))),
    ("flac: 10 minutes of silence", "audio", LARGE, lambda: sound("FLAC", 600, 8_000)),
    ("flac: 40 million samples in 8 channels", "audio", LARGE, lambda: sound("FLAC", 26, 192_000, 8)),
    ("mp3: 5 minutes and 10 seconds", "audio", LARGE, lambda: sound("MP3", 310, 8_000)),
    ("opus: 5 minutes and 10 seconds", "audio", LARGE, lambda: track("ogg", "libopus", 310)),
    ("mp4: a sound of 5 minutes and 10 seconds", "audio", LARGE, lambda: track("mp4", "aac", 310, 8_000)),
    ("webm: a sound of 5 minutes and 10 seconds", "audio", LARGE, lambda: track("webm", "libopus", 310)),
    ("mp4: frames of 4,200 by 2,200", "video", LARGE, lambda: film(size=(4_200, 2_200), frames=1)),
    ("mp4: 36,001 frames", "video", LARGE, lambda: copies("mp4", "mpeg4", 36_001, 1)),
    ("mp4: three hours in two frames", "video", LARGE, lambda: copies("mp4", "mpeg4", 2, 108_000)),
    ("mp4: without its end", "video", BROKEN, lambda: film()[:-200]),
    (
        "mp4: a box of 2**63 bytes",
        "video",
        BROKEN,
        lambda: film()[:32] + b"\0\0\0\1moov" + (2**63 - 1).to_bytes(8, "big"),
    ),
    ("webm: 36,001 frames", "video", LARGE, lambda: copies("webm", "libvpx", 36_001, 1)),
    ("webm: three hours in two frames", "video", LARGE, lambda: copies("webm", "libvpx", 2, 108_000)),
    ("webm: frames of 16,383 by 16,383 in one of 64 by 48", "video", BROKEN, grown),
    ("webm: without its end", "video", BROKEN, lambda: film("webm", "libvpx")[:300]),
    ("matroska", "video", TYPE, lambda: film("matroska")),
    ("avi", "video", TYPE, lambda: film("avi")),
    ("a playlist", "video", TYPE, lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/\n"),
    ("svg", "image", TYPE, lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    ("postscript", "image", TYPE, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"),
    ("tiff", "image", TYPE, lambda: picture("TIFF")),
    ("gzip", "image", TYPE, lambda: zlib.compress(bytes(10**6))),
    ("a sound that is called an image", "image", TYPE, lambda: sound()),
    ("nothing", "image", TYPE, lambda: b""),
]

# JSON: name, code, body.
BODIES: list[tuple[str, str, Callable[[], bytes]]] = [
    ("100,000 brackets", "too_deep", lambda: b"[" * 99_000),
    ("10 million brackets", "too_many_items", lambda: b"[" * 10_000_000),
    ("65 lists", "too_deep", lambda: b"[" * 65 + b"]" * 65),
    ("1,000 objects", "too_deep", lambda: b'{"a":' * 1_000 + b"1" + b"}" * 1_000),
    ("9 million empty lists", "too_many_items", lambda: b"[" + b"[]," * 9_000_000 + b"[]]"),
    ("5 million keys", "too_many_items", lambda: b"{" + b'"":0,' * 5_000_000 + b'"":0}'),
    ("41 MB", "body_too_large", lambda: b'"' + b"a" * 41_000_000 + b'"'),
    ("a number of a million digits", "malformed_json", lambda: b"9" * 1_000_000),
    ("a number beyond 64 bits", "malformed_json", lambda: b"[1e999]"),
    ("NaN", "malformed_json", lambda: b'{"a": NaN}'),
    ("half a surrogate", "malformed_json", lambda: b'"\\ud800"'),
    ("UTF-16", "malformed_json", lambda: '{"a": 1}'.encode("utf-16")),
    ("Latin-1", "malformed_json", lambda: '"é"'.encode("latin-1")),
    ("nothing", "malformed_json", lambda: b""),
    ("two values", "malformed_json", lambda: b"{} {}"),
    ("an open string of 27 MB", "malformed_json", lambda: b'"' + b"\\u0000" * 4_500_000),
]


def large_url() -> str:
    return "data:image/png;base64," + base64.b64encode(bytes(15_000_000)).decode()


def frame_list(count: int) -> bytes:
    return json.dumps({"video": ["data:image/png;base64,AAAA"] * count}).encode()
