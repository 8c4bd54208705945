"""Sounds -> log-mel frames, and videos -> frames at some times, against the plain use of the same libraries.

    OMP_NUM_THREADS=1 python benchmarks/audio_video.py --clock cpu

Sounds: half a minute of generated chords as WAV, FLAC and MP3, 44.1 kHz in stereo (resampled) and 16 kHz in mono; plain
is soundfile, torchaudio's resampling, mel filters and a logarithm, every call with its transforms made beforehand.
Videos: generated (moving shapes over noise, H.264, a keyframe every two seconds); plain decodes every frame with PyAV
and keeps those asked for. Results are compared before anything is timed. Rates are in seconds of media a second.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial

import av
import numpy as np
import soundfile
import torch
from common import Bench
from torch import Tensor
from torchaudio.transforms import MelSpectrogram, Resample

from mm.datasets.decode import decode_audio, decode_video
from mm.tokenizers.audio import AudioTokenizer
from mm.types import Media

SECONDS, FPS, HEIGHT, WIDTH, KEYFRAMES = 30, 25, 360, 640, 50


def sound(format: str, rate: int, channels: int) -> bytes:
    """Chords that change twice a second, over noise."""
    generator = np.random.default_rng(0)
    time = np.arange(SECONDS * rate) / rate
    pitches = 110 * 2 ** (generator.integers(0, 36, (2 * SECONDS, 3)) / 12)
    waves = np.sin(2 * np.pi * pitches[(2 * time).astype(int)] * time[:, None]).mean(1)
    samples = 0.5 * waves[:, None] + 0.02 * generator.normal(size=(len(time), channels))
    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1), rate, format=format)
    return file.getvalue()


def video(seconds: int) -> bytes:
    generator = np.random.default_rng(0)
    file = io.BytesIO()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    noise = generator.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": str(KEYFRAMES), "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(seconds * FPS):
            pixels = np.roll(noise, 3 * number, 1)
            for shape, color in enumerate(((220, 60, 60), (60, 200, 80), (70, 90, 230))):
                at = (
                    HEIGHT / 2 * (1 + 0.6 * np.sin(number / 9 + shape)),
                    WIDTH / 2 * (1 + 0.6 * np.cos(number / 13 + shape)),
                )
                pixels[(y - at[0]) ** 2 + (x - at[1]) ** 2 < 40**2] = color
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def our_mels(data: bytes, tokenizer: AudioTokenizer) -> Tensor:
    return tokenizer(decode_audio(Media("audio", data, "a"))).values


def plain_mels(data: bytes, resample: Resample, mel: MelSpectrogram) -> Tensor:
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    log = mel(resample(torch.from_numpy(samples).mean(1))).clamp(min=1e-10).log10()
    return ((torch.maximum(log, log.max() - 8) + 4) / 4).T


def our_frames(data: bytes, times: list[float]) -> Tensor:
    with decode_video(Media("video", data, "a.mp4")) as clip:
        return clip.frames_at(times)


def all_frames(data: bytes, times: list[float]) -> Tensor:
    wanted, kept = {int(time * FPS) for time in times}, []
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                kept.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
    return torch.stack(kept)


def compare(
    bench: Bench, what: str, seconds: float, peer: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor]
) -> None:
    taken = bench.times({"ours": ours, "plain": plain}, warmup=1)
    bench.add(
        what=what, run="mm", rate=seconds / taken["ours"][0], unit="x real time", noise=taken["ours"][1], peer=peer,
        ratio=taken["plain"][0] / taken["ours"][0], judged="ratio",
    )  # fmt: skip


def main() -> int:
    bench = Bench(__doc__)
    tokenizer = AudioTokenizer(max_seconds=2 * SECONDS)
    mel = MelSpectrogram(16_000, 400, hop_length=160, n_mels=80, norm="slaney", mel_scale="slaney")
    for rate, channels in ((16_000, 1), (44_100, 2)):
        for format in ("WAV", "FLAC", "MP3"):
            data, resample = sound(format, rate, channels), Resample(rate, 16_000)
            ours, plain = partial(our_mels, data, tokenizer), partial(plain_mels, data, resample, mel)
            # The tokenizer gives a frame less at the end, and its window is its own.
            difference = (ours() - plain()[: len(ours())]).abs()
            assert float(difference.median()) < 1e-3, float(difference.median())
            compare(
                bench,
                f"{format}, {rate / 1000:g} kHz x {channels}, {SECONDS} s",
                SECONDS,
                "soundfile + torchaudio",
                ours,
                plain,
            )
    for length, times in ((10, [float(t) for t in range(10)]), (60, [7.5 * t for t in range(8)])):
        data = video(length)
        ours, plain = partial(our_frames, data, times), partial(all_frames, data, times)
        assert torch.equal(ours(), plain())
        compare(bench, f"H.264 of {length} s, {len(times)} frames", length, "PyAV, decoding all", ours, plain)
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
