"""Media made smaller or uniform before they go into a shard: images, sounds and videos in other sizes and encodings.

The same file and settings give the same bytes, on one machine and one set of library versions.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import PurePath
from typing import Any, Literal

import numpy as np

from mm.datasets.decode import decode_audio, decode_image, decode_video
from mm.datasets.steps import Step, given
from mm.types import Media, MediaError, Sample

MAX_SECONDS = 1_200.0  # of a sound to be resampled: 20 minutes of 48 kHz stereo are 460 MB while it is worked on
FORMATS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
SUFFIX = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}


@dataclass(frozen=True)
class Transform(Step):
    """What media become; a kind for which nothing is set stays as it is, to the byte.

    image_side     images are made smaller until the longer side has at most this many pixels (Lanczos), never larger
    image_format   jpeg, png or webp; by default JPEG stays JPEG, WebP stays WebP and everything else becomes PNG.
                   An image that is small enough and of the format is kept as it is
    image_quality  of JPEG and WebP
    audio_rate     hertz
    audio_mono     one channel, the mean of all
    audio_format   flac or wav, both of 16 bits
    video_fps      the frames shown at 0, 1/fps, 2/fps, ... seconds, each as a JPEG in a Matroska file, without sound:
                   every frame can then be read on its own
    video_side     as image_side, for those frames
    """

    image_side: int | None = None
    image_format: Literal["jpeg", "png", "webp"] | None = None
    image_quality: int = 90
    audio_rate: int | None = None
    audio_mono: bool = False
    audio_format: Literal["flac", "wav"] = "flac"
    video_fps: float | None = None
    video_side: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_side", "audio_rate", "video_fps", "video_side"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--transform {name}={value:g}: expected more than 0")
        if not 1 <= self.image_quality <= 100:
            raise ValueError(f"--transform image_quality={self.image_quality}: expected 1 to 100")
        if self.video_side is not None and self.video_fps is None:
            raise ValueError("--transform video_side needs video_fps too")

    def __call__(self, sample: Sample) -> Sample:
        return replace(sample, media=[self._medium(item) for item in sample.media])

    def describe(self) -> dict[str, Any]:
        return {"transform": given(self)}

    def _medium(self, item: Media) -> Media:
        if item.kind == "image" and (self.image_side is not None or self.image_format is not None):
            return self._image(item)
        if item.kind == "audio" and (self.audio_rate is not None or self.audio_mono):
            return self._audio(item)
        if item.kind == "video" and self.video_fps is not None:
            return self._video(item, self.video_fps)
        return item

    def _image(self, item: Media) -> Media:
        from PIL import Image

        pixels = decode_image(item)
        height, width = pixels.shape[1:]
        had = FORMATS.get(PurePath(item.name).suffix.lower())
        form = self.image_format or had or "png"
        size = _fit(width, height, self.image_side)
        if had == form and size == (width, height) and _upright(item):
            return item
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, form, **({} if form == "png" else {"quality": self.image_quality}))
        return Media("image", file.getvalue(), _renamed(item.name, SUFFIX[form]))

    def _audio(self, item: Media) -> Media:
        import soundfile

        sound = decode_audio(item, MAX_SECONDS)
        samples = sound.samples.mean(0, keepdim=True) if self.audio_mono else sound.samples
        rate = self.audio_rate or sound.rate
        values = _resampled(samples.numpy(), sound.rate, rate)
        if values.shape[0] > 8:
            raise MediaError(f"audio {item.name!r} has {values.shape[0]} channels: FLAC holds 8; set audio_mono=yes")
        file = io.BytesIO()
        soundfile.write(file, values.T, rate, "PCM_16", format=self.audio_format.upper())
        return Media("audio", file.getvalue(), _renamed(item.name, f".{self.audio_format}"))

    def _video(self, item: Media, fps: float) -> Media:
        import av
        from av.codec.context import Flags
        from PIL import Image

        file = io.BytesIO()
        unit = Fraction(fps).limit_denominator(1001)
        with decode_video(item) as clip, av.open(file, "w", "matroska", {"fflags": "bitexact"}) as container:
            height, width = clip.size
            size = _fit(width, height, self.video_side)
            stream: Any = container.add_stream("mjpeg", rate=unit, options={"qmin": "3", "qmax": "3"})
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p"
            stream.codec_context.flags |= Flags.bitexact
            stream.codec_context.thread_count = 1
            for number in range(max(1, int(np.ceil(clip.duration * fps - 1e-6)))):
                pixels = clip.frames_at([number / fps])[0].permute(1, 2, 0).numpy()
                image = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
                frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
                frame.pts, frame.time_base = number, 1 / unit
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return Media("video", file.getvalue(), _renamed(item.name, ".mkv"))


def _fit(width: int, height: int, side: int | None) -> tuple[int, int]:
    """(width, height) of at most `side` pixels, in proportion, at least 1."""
    if side is None or max(width, height) <= side:
        return width, height
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _upright(item: Media) -> bool:
    """Whether the pixels are stored as they are shown: those of a turned photo are not."""
    from PIL import Image

    data = io.BytesIO(item.data) if isinstance(item.data, bytes) else item.data
    with Image.open(data) as image:
        return image.getexif().get(0x0112, 1) == 1


def _resampled(samples: np.ndarray, before: int, after: int) -> np.ndarray:
    """(C, S) float32 at another rate, by FFmpeg's polyphase filter, a second at a time."""
    import av

    if before == after:
        return samples
    layout = {1: "mono", 2: "stereo"}.get(len(samples), f"{len(samples)}c")
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=after)
    blocks = []
    for start in range(0, samples.shape[1], before):
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[:, start : start + before]), format="fltp", layout=layout
        )
        frame.sample_rate, frame.pts = before, start
        blocks += [block.to_ndarray() for block in resampler.resample(frame)]
    blocks += [block.to_ndarray() for block in resampler.resample(None)]
    return np.concatenate(blocks, axis=1).clip(-1, 1)


def _renamed(name: str, suffix: str) -> str:
    return str(PurePath(name).with_suffix(suffix))
