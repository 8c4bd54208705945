"""Media files -> pixels, sound and frames: PNG, JPEG, WAV, FLAC, MP3, MP4, WebM, ... as tensors, or a MediaError.

Files are untrusted: sizes are checked before pixels are allocated, containers that refer to other files are not
opened, and every failure is one line that names the file. Pillow, soundfile and PyAV are imported on first use.

Shape legend: `H`, `W` pixels; `C` channels; `S` samples.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mm.datasets.video_clip import VideoClip, codec_errors, open_container
from mm.types import Media, MediaError, Waveform

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000  # of an image, or of one frame of a video
MAX_SECONDS = 3_600.0  # of sound: an hour of CD audio is 1.3 GB as float32


def decode(
    media: Media, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS
) -> Tensor | Waveform | VideoClip:
    """An image as uint8 (3, H, W), audio as a Waveform, a video as an opened Clip.

    Raises MediaError for a file that is missing, empty, a directory, not of its kind, truncated, larger than
    `max_pixels`, longer than `max_seconds` (sound), or without samples or frames.
    """
    match media.kind:
        case "image":
            return decode_image(media, max_pixels)
        case "audio":
            return decode_audio(media, max_seconds)
        case "video":
            return decode_video(media, max_pixels)


def decode_image(media: Media, max_pixels: int = MAX_PIXELS) -> Tensor:
    """uint8 (3, H, W), upright (EXIF orientation applied), on white where transparent; the first frame if animated.

    16-bit grey is scaled to 8 bits. 32-bit and floating-point pixels have no fixed range and are refused.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    label = _label(media)
    data = _read(media)
    with codec_errors(label, "is a damaged or truncated image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            raise MediaError(f"{label} is not an image that can be read (PNG, JPEG, WebP, GIF, TIFF, ...)") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise MediaError(f"{label} has more pixels than Pillow opens ({Image.MAX_IMAGE_PIXELS:,})") from error
        with image:
            if image.width * image.height > max_pixels:
                raise MediaError(f"{label} has {image.width} x {image.height} pixels, more than {max_pixels:,}")
            image.load()
            return _pixels(ImageOps.exif_transpose(image), label)


def _pixels(image: Image.Image, label: str) -> Tensor:
    """A loaded Pillow image of any mode -> uint8 (3, H, W)."""
    from PIL import Image

    if image.mode == "F":
        raise MediaError(f"{label} has floating-point pixels of no known range: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip everything above 255 to white
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65_535:
            raise MediaError(f"{label} has 32-bit pixels of no known range: convert it to 8 or 16 bits")
        return torch.from_numpy(((wide + 128) // 257).astype(np.uint8)).repeat(3, 1, 1)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def decode_audio(media: Media, max_seconds: float = MAX_SECONDS) -> Waveform:
    """The sound of an audio file, or the first sound track of a video, at its own rate and with its own channels.

    libsndfile reads WAV, FLAC, Ogg, MP3, AIFF, ...; FFmpeg reads what it does not know (M4A, AAC, MP4, WebM, ...).
    Floating-point files that go beyond [-1, 1] are scaled down to their peak.
    """
    import soundfile

    label = _label(media)
    data = _read(media)
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError:
        samples, rate = _sound_track(data, label, max_seconds)
    else:
        with file, codec_errors(label, "is a damaged or truncated sound"):
            rate = int(file.samplerate)
            _check_length(file.frames, rate, max_seconds, label)
            samples = file.read(dtype="float32", always_2d=True).T
            if samples.shape[1] < file.frames or _cut_short(data):
                raise MediaError(f"{label} is truncated: the file ends before its sound does")
    if samples.size == 0:
        raise MediaError(f"{label} has no sound: 0 samples")
    if not np.isfinite(samples).all():
        raise MediaError(f"{label} has samples that are not finite numbers")
    peak = max(1.0, float(np.abs(samples).max()))
    return Waveform(torch.from_numpy(np.ascontiguousarray(samples / np.float32(peak))), rate)


def _sound_track(data: bytes, label: str, max_seconds: float) -> tuple[np.ndarray, int]:
    """(C, S) float32 and the rate in hertz of the first audio stream, by FFmpeg."""
    import av

    with codec_errors(label, "is not a sound that can be read"), open_container(io.BytesIO(data)) as container:
        if not container.streams.audio:
            raise MediaError(f"{label} has no sound: it has no audio track")
        stream = container.streams.audio[0]
        planar = av.AudioResampler(format="fltp")  # only the sample format: rate and channels stay
        blocks = [np.empty((stream.channels, 0), np.float32)]
        total = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError(f"{label} is truncated: the file ends before its sound does")
            frames = [block for frame in packet.decode() for block in planar.resample(frame)]
            blocks += [frame.to_ndarray() for frame in frames]
            total += sum(frame.samples for frame in frames)
            _check_length(total, stream.rate, max_seconds, label)
        return np.concatenate(blocks, axis=1), int(stream.rate)


def decode_video(media: Media, max_pixels: int = MAX_PIXELS) -> VideoClip:
    """An opened video, whose frames are decoded when they are asked for. It keeps the file open until it is closed."""
    label = _label(media)
    if isinstance(media.data, Path):
        _check_file(media.data, label)
        # With its protocol, or FFmpeg would take a file called "http:..." for an address.
        return VideoClip(f"file:{media.data}", label, max_pixels)
    return VideoClip(io.BytesIO(_read(media)), label, max_pixels)


def _read(media: Media) -> bytes:
    label = _label(media)
    data = media.data
    if isinstance(data, Path):
        _check_file(data, label)
        try:
            data = data.read_bytes()
        except OSError as error:
            raise MediaError(f"{label} cannot be read ({error.strerror})") from error
    if not data:
        raise MediaError(f"{label} is empty")
    return data


def _check_file(path: Path, label: str) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise MediaError(f"{label} does not exist ({str(path)!r})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise MediaError(f"{label} cannot be read ({error})") from error
    if path.is_dir():
        raise MediaError(f"{label} is a directory, not a file")
    if size == 0:
        raise MediaError(f"{label} is empty")


def _check_length(samples: int, rate: int, max_seconds: float, label: str) -> None:
    if samples > max_seconds * rate:
        raise MediaError(f"{label} lasts {samples / rate:.0f} s or more, longer than {max_seconds:g} s")


def _cut_short(data: bytes) -> bool:
    """Whether a RIFF (WAV) file says that it is longer than it is; a recorder that streams writes 2**31 or more."""
    declared = int.from_bytes(data[4:8], "little") + 8
    return data[:4] == b"RIFF" and len(data) < declared < 2**31


def _label(media: Media) -> str:
    return f"{media.kind} {media.name!r}"  # repr: a line break in a name must not break the line
