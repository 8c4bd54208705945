"""Media files of every format that is taken, and ones that are meant to break their decoder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image


def picture(form: str = "PNG", side: int = 32, frames: int = 1, **options: Any) -> bytes:
    """Noise, so that every pixel tells."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(frames)]
    file = io.BytesIO()
    images[0].save(file, form, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}), **options)
    return file.getvalue()


def sound(form: str = "WAV", seconds: float = 0.5, rate: int = 8_000, channels: int = 1, **options: Any) -> bytes:
    """A tone; silence, where it is long."""
    samples = np.zeros((round(seconds * rate), channels), np.float32)
    if seconds < 5:
        samples += 0.1 * np.sin(np.arange(len(samples)) / 5)[:, None]
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, **options)
    return file.getvalue()


def film(
    form: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    frames: int = 10,
    rate: int = 10,
    step: int = 1,
) -> bytes:
    """Grey frames, `step` / `rate` seconds apart."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "x264-params": "keyint=250"}
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), number % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts = number * step
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def track(form: str, codec: str, seconds: float = 0.5, rate: int = 48_000, layout: str = "mono") -> bytes:
    """A sound in a film's container."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        silence = np.zeros((av.AudioLayout(layout).nb_channels, rate), np.float32)
        left, at = round(seconds * rate), 0
        while left:
            frame = av.AudioFrame.from_ndarray(silence[:, : min(left, rate)], format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, at
            left, at = left - frame.samples, at + frame.samples
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def harmless() -> Iterator[tuple[str, Any, bytes]]:
    """(format, kind, file) for each that is taken."""
    for form in ("JPEG", "PNG", "GIF", "WebP"):
        yield form, "image", picture(form)
    for form in ("WAV", "MP3", "FLAC", "OGG"):
        yield form, "audio", sound(form)
    yield "MP4", "audio", track("mp4", "aac")
    yield "WebM", "audio", track("webm", "libopus")
    yield "MP4", "video", film()
    yield "WebM", "video", film("webm", "libvpx")


def png(width: int, height: int, data: bytes, bits: int = 8, colours: int = 0, before: bytes = b"") -> bytes:
    """From its parts: what the header says need not be in it. `data` is compressed, `before` are other chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), before, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros(size: int, level: int = 9) -> bytes:
    """So many zero bytes, compressed."""
    packer, block = zlib.compressobj(level), bytes(1 << 20)
    parts = [packer.compress(block[: min(len(block), size - at)]) for at in range(0, size, len(block))]
    return b"".join([*parts, packer.flush()])
