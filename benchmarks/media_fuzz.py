"""Mutated media files over all formats: each gives pixels, sound or frames, or a MediaError; nothing else, and soon.

    python benchmarks/media_fuzz.py [--files 10000] [--seed 0]

A process of its own decodes them, so that a crash of a codec is seen as one. Counted against the decoder are
its own end, an exception that is no MediaError, more than 2 s of its processor time for a file, more than 512 MiB of
memory above what it takes for whole files, and no answer within a minute.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import av
import numpy as np
import soundfile
from av.logging import PANIC, set_level
from PIL import Image
from torch import Tensor

from mm.datasets.decode import decode
from mm.types import Media, MediaError, Waveform

SECONDS, MEGABYTES, PATIENCE = 2.0, 512, 60.0
IMAGES = ("png", "jpg", "webp", "gif", "bmp", "tif")
SOUNDS = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}
VIDEOS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4", "mov": "mpeg4"}
EXTREMES = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\1", b"\x80\0\0\0")


def seeds() -> list[Media]:
    """Small whole files of every format, several kinds of each where there are any."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (48, 64, 3), np.uint8)
    found = []
    for suffix in IMAGES:
        form = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        variants: list[tuple[Image.Image, dict[str, Any]]] = [(Image.fromarray(noise), {})]
        if suffix in ("png", "webp", "gif", "tif"):
            variants.append((Image.fromarray(noise).convert("RGBA"), {}))
        if suffix in ("gif", "webp", "png"):
            frames = [Image.fromarray(np.roll(noise, shift, 1)) for shift in range(3)]
            variants.append((frames[0], {"save_all": True, "append_images": frames[1:]}))
        if suffix in ("jpg", "tif"):
            variants.append((Image.fromarray(noise).convert("CMYK"), {}))
        if suffix == "jpg":
            variants.append((Image.fromarray(noise), {"progressive": True}))
        if suffix == "png":
            variants.append((Image.fromarray(draw.integers(0, 65535, (48, 64)).astype(np.uint16)), {}))
        for number, (image, options) in enumerate(variants):
            file = io.BytesIO()
            image.save(file, form, **options)
            found.append(Media("image", file.getvalue(), f"{number}.{suffix}"))
    tone = np.sin(np.arange(8000) / 8000 * 2 * np.pi * 440)[:, None] * [0.5, 0.3]
    for suffix, form in SOUNDS.items():
        file = io.BytesIO()
        soundfile.write(file, tone, 8000, format=form)
        found.append(Media("audio", file.getvalue(), f"0.{suffix}"))
    found += [
        Media("audio", _av_sound(suffix, codec), f"0.{suffix}") for suffix, codec in (("m4a", "aac"), ("aac", "aac"))
    ]
    return found + [Media("video", _av_video(suffix, codec), f"0.{suffix}") for suffix, codec in VIDEOS.items()]


def _av_sound(suffix: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", {"m4a": "mp4", "aac": "adts"}[suffix]) as container:
        stream: Any = container.add_stream(codec, rate=16_000)
        wave = np.sin(np.arange(16_000) / 16_000 * 2 * np.pi * 440).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _av_video(suffix: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", {"mkv": "matroska"}.get(suffix, suffix)) as container:
        stream: Any = container.add_stream(codec, rate=10, options={"g": "5", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits flipped, a number made extreme, a piece overwritten, doubled or cut out, the end cut
    off. Half of the changes are in the first 512 bytes, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not changed:
            break
        place = draw.randrange(min(512, len(changed)) if draw.random() < 0.5 else len(changed))
        length = draw.choice((1, 2, 4, 16, 200))
        match draw.randrange(6):
            case 0:
                for _ in range(draw.choice((1, 8, 64))):
                    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            case 1:
                changed[place : place + 4] = draw.choice(EXTREMES)
            case 2:
                changed[place : place + length] = draw.randbytes(length)
            case 3:
                changed[place:place] = changed[place : place + length] * draw.choice((1, 3, 50))
            case 4:
                del changed[place : place + length]
            case 5:
                del changed[place:]
    return bytes(changed)


def use(media: Media) -> None:
    """Decodes all of a file, as far as training would."""
    opened = decode(media)
    if isinstance(opened, (Tensor, Waveform)):
        return
    with opened as clip:  # type: ignore[union-attr]
        for second in np.linspace(0, clip.duration, 4):
            clip.frames_at([float(second)])


def serve(pipe: Connection) -> None:
    """The decoding process: media in; outcome, seconds of processor time and peak memory in MiB out."""
    set_level(PANIC)
    while True:
        media = pipe.recv()
        begun = time.process_time()
        try:
            use(media)
            outcome = "read"
        except MediaError as error:
            outcome = "refused" if media.name in str(error) and "\n" not in str(error) else f"unclear: {error}"
        except BaseException as error:  # any other is what this script looks for
            outcome = f"{type(error).__name__}: {error}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        pipe.send((outcome, time.process_time() - begun, peak))


class Decoder:
    """The process and the pipe to it; started anew when it dies or hangs."""

    def __init__(self, whole: list[Media]) -> None:
        self.whole = whole
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.baseline = max(self(media)[2] for media in self.whole)

    def __call__(self, media: Media) -> tuple[str, float, float]:
        try:
            self.pipe.send(media)
            if self.pipe.poll(PATIENCE):
                return self.pipe.recv()
            outcome = "hang"
        except (EOFError, OSError):
            outcome = "crash"
        self.process.kill()
        self.process.join()
        self.start()
        return outcome, PATIENCE, self.baseline


def run(files: int, seed: int, tell: Callable[[str], None] = print) -> tuple[Counter[str], float, float]:
    """Counts of "read", "refused" and "wrong", the longest time, and the most memory above that of whole files."""
    draw = random.Random(seed)
    whole = seeds()
    decoder = Decoder(whole)
    counts = Counter[str]()
    longest = most = 0.0
    for number in range(files):
        media = whole[number % len(whole)]
        media = Media(media.kind, mutate(bytes(media.data), draw), media.name)  # type: ignore[arg-type]
        outcome, seconds, peak = decoder(media)
        longest, most = max(longest, seconds), max(most, peak - decoder.baseline)
        bad = outcome if outcome not in ("read", "refused") else "slow" if seconds > SECONDS else None
        bad = bad or ("large" if peak - decoder.baseline > MEGABYTES else None)
        counts["wrong" if bad else outcome] += 1
        if bad:
            tell(f"file {number} ({media.name}): {bad}, {seconds:.2f} s, {peak - decoder.baseline:.0f} MiB")
    decoder.process.kill()
    return counts, longest, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, longest, most = run(options.files, options.seed)
    print(
        f"{options.files} files: {counts['read']} read, {counts['refused']} refused, {counts['wrong']} wrong; "
        f"longest {longest:.2f} s, most memory {most:.0f} MiB above whole files"
    )
    raise SystemExit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
