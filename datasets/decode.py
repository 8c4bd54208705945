"""Media files -> pixels, sound and frames: PNG, JPEG, WAV, FLAC, MP3, MP4, WebM, ... as tensors, or a MediaError.

Files are untrusted: sizes are checked before pixels are allocated, containers that refer to other files are not
opened, and every failure is one line that names the file. Pillow, soundfile and PyAV are imported on first use.

Shape legend: `H`, `W` pixels; `C` channels; `S` samples.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mm.datasets.video_clip import VideoClip, codec_errors, open_container
from mm.types import Media, MediaError, MediaTooLarge, Waveform

if TYPE_CHECKING:
    from PIL import Image
    from soundfile import SoundFile

MAX_PIXELS = 64_000_000  # of an image, or of one frame of a video
MAX_SECONDS = 3_600.0  # of sound
MAX_VALUES = 320_000_000  # samples of a sound, over all channels: an hour of CD audio, 1.3 GB as float32
BLOCK = 1 << 16  # samples of a channel that are read at a time
STRIP_PIXELS = 1 << 20  # of an image that are converted at a time
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's others are rare, and some start programs (EPS)
FACTORS = (8, 4, 2)  # by which libjpeg divides a JPEG's sides at no cost; others are slower than decoding all of it
ORIENTATION = 0x0112  # of EXIF; 1 is upright
TURNS: dict[int, Callable[[Tensor], Tensor]] = {  # of (3, H, W), as the standard numbers them
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.flip(1, 2),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.transpose(1, 2).flip(2),
    7: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
    8: lambda pixels: pixels.transpose(1, 2).flip(1),
}


class Resizer(Protocol):
    """How the caller resizes images (ImageTokenizer does): to what size, and by which filter."""

    def size_for(self, height: int, width: int) -> tuple[int, int]: ...
    def resize(self, frames: Tensor, size: tuple[int, int], covered: tuple[float, float]) -> Tensor: ...


class Probe(NamedTuple):
    width: int  # pixels as stored; 0 for a sound
    height: int
    seconds: float  # 0 for an image


def decode(
    media: Media, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS, resizer: Resizer | None = None
) -> Tensor | Waveform | VideoClip:
    """An image as uint8 (3, H, W), audio as a Waveform, a video as an opened Clip. `resizer`: see `decode_image`.

    Raises MediaError for a file that is missing, empty, a directory, not of its kind, truncated, larger than
    `max_pixels`, longer than `max_seconds` (sound), or without samples or frames.
    """
    match media.kind:
        case "image":
            return decode_image(media, max_pixels, resizer)
        case "audio":
            return decode_audio(media, max_seconds)
        case "video":
            return decode_video(media, max_pixels)


def probe(media: Media) -> Probe:
    """The size and length of a media file from its headers (of a video, all packets' too), without decoding it."""
    label = _label(media)
    if media.kind == "image":
        with open_image(_read(media), label, MAX_PIXELS) as image:
            return Probe(image.width, image.height, 0.0)
    if media.kind == "video":
        with decode_video(media) as clip:
            return Probe(clip.size[1], clip.size[0], clip.duration)
    import soundfile

    data = _read(media)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return Probe(0, 0, file.frames / file.samplerate)
    except soundfile.LibsndfileError:
        samples, rate = _sound_track(data, label, MAX_SECONDS)
        return Probe(0, 0, samples.shape[1] / rate)


def decode_image(media: Media, max_pixels: int = MAX_PIXELS, resizer: Resizer | None = None) -> Tensor:
    """uint8 (3, H, W), upright (EXIF orientation applied), on white where transparent; the first frame if animated.

    16-bit grey is scaled to 8 bits. 32-bit and floating-point pixels have no fixed range and are refused. With a
    `resizer`, the image has the size and the filter that it asks for; a JPEG of at least twice that size is decoded at
    a half, a quarter or an eighth: most of a photograph's pixels are never computed.
    """
    label, data = _label(media), _read(media)
    with open_image(data, label, max_pixels) as image:
        factor, pixels = 1, None
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            factor, pixels = _jpeg(image, data, resizer)
        if pixels is None:
            factor = 1
            image.load()
            pixels = _pixels(image, label)
        height, width = image.height, image.width
        turn = image.getexif().get(ORIENTATION, 1)  # after loading: Pillow turns a TIFF itself while it loads it
    if turn in TURNS:
        pixels = TURNS[turn](pixels).contiguous()
        height, width = (width, height) if turn >= 5 else (height, width)
    if resizer is None:
        return pixels
    return resizer.resize(pixels[None], resizer.size_for(height, width), (height / factor, width / factor))[0]


@contextmanager
def open_image(data: bytes, label: str, max_pixels: int) -> Iterator[Image.Image]:
    """Pillow's view of an image file of one of FORMATS, its size checked, its pixels not loaded yet.

    Whatever Pillow raises inside the `with` becomes a MediaError.
    """
    from PIL import Image, UnidentifiedImageError

    with codec_errors(label, "is a damaged or truncated image"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # odd tags and the like: what matters is whether it opens
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise MediaError(f"{label} is not an image that can be read ({', '.join(FORMATS)})") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise MediaTooLarge(f"{label} has more pixels than Pillow opens ({Image.MAX_IMAGE_PIXELS:,})") from error
        with image:
            if image.width * image.height > max_pixels:
                raise MediaTooLarge(f"{label} has {image.width} x {image.height} pixels, more than {max_pixels:,}")
            yield image


def _jpeg(image: Image.Image, data: bytes, resizer: Resizer | None) -> tuple[int, Tensor | None]:
    """By what the sides are divided, and what Pillow would give, bit for bit, in half its time; None where the file is
    not quite as it should be, which is then for Pillow to judge."""
    import simplejpeg

    factor = 1
    if resizer is not None:
        upright = image.size if image.getexif().get(ORIENTATION, 1) >= 5 else image.size[::-1]
        room = min(have / want for have, want in zip(upright, resizer.size_for(*upright), strict=True))
        factor = next((factor for factor in FACTORS if room >= factor), 1)
    height, width = (-(-side // factor) for side in image.size[::-1])  # libjpeg rounds up
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=factor)
    except ValueError:
        return factor, None
    return factor, torch.from_numpy(pixels).permute(2, 0, 1)


def _pixels(image: Image.Image, label: str) -> Tensor:
    """A loaded Pillow image of any mode -> uint8 (3, H, W), some rows at a time: Pillow's own conversions of a whole
    image would take several times its size in memory."""
    if image.mode == "F":
        raise MediaError(f"{label} has floating-point pixels of no known range: convert it to 8 or 16 bits")
    transparent = image.has_transparency_data
    # In memory as Pillow has it, colours innermost: nothing is rearranged, and resizing is faster so.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = _strip(strip, transparent, label)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _strip(image: Image.Image, transparent: bool, label: str) -> np.ndarray:
    """uint8, of a shape that fills (H, W, 3)."""
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow's own conversion would clip everything above 255 to white
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65_535:
            raise MediaError(f"{label} has 32-bit pixels of no known range: convert it to 8 or 16 bits")
        return ((wide + 128) // 257).astype(np.uint8)[:, :, None]
    if transparent:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


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
            _check_length(file.frames, file.channels, rate, max_seconds, label)
            samples = _blocks(file)
            if samples.shape[1] < file.frames or _cut_short(data):
                raise MediaError(f"{label} is truncated: the file ends before its sound does")
    if samples.size == 0:
        raise MediaError(f"{label} has no sound: 0 samples")
    if not np.isfinite(samples).all():
        raise MediaError(f"{label} has samples that are not finite numbers")
    peak = max(float(samples.max()), -float(samples.min()))
    if peak > 1:
        samples = samples / np.float32(peak)
    return Waveform(torch.from_numpy(np.ascontiguousarray(samples)), rate)


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
            _check_length(total, stream.channels, stream.rate, max_seconds, label)
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


def _blocks(file: SoundFile) -> np.ndarray:
    """(C, S) float32 of what is there: a damaged header may claim more, which must not be allocated."""
    blocks = []
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block.T)
    return np.concatenate(blocks, axis=1) if blocks else np.empty((file.channels, 0), np.float32)


def _check_length(samples: int, channels: int, rate: int, max_seconds: float, label: str) -> None:
    if samples > max_seconds * rate:
        raise MediaTooLarge(f"{label} lasts {samples / max(1, rate):.0f} s or more, longer than {max_seconds:g} s")
    if samples * channels > MAX_VALUES:
        raise MediaTooLarge(
            f"{label} has {samples * channels:,} samples in {channels} channels, more than {MAX_VALUES:,}"
        )


def _cut_short(data: bytes) -> bool:
    """Whether a RIFF (WAV) file says that it is longer than it is; a recorder that streams writes 2**31 or more."""
    declared = int.from_bytes(data[4:8], "little") + 8
    return data[:4] == b"RIFF" and len(data) < declared < 2**31


def _label(media: Media) -> str:
    return f"{media.kind} {media.name!r}"  # repr: a line break in a name must not break the line
