"""Puts media files into the page itself, as data URIs. What is too large or unreadable is said instead."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mm.datasets.decode import decode_audio, decode_image, decode_video
from mm.datasets.video_clip import VideoClip
from mm.report import plots
from mm.types import KINDS, Kind, Media, MediaError, Waveform

SUFFIXES: dict[Kind, dict[str, str]] = {
    "image": dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"), "image/*"),  # re-encoded
    "audio": {".wav": "audio/wav", ".mp3": "audio/mpeg", ".flac": "audio/flac", ".ogg": "audio/ogg"},
    "video": {".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime", ".mkv": "video/x-matroska"},
}
MAX_BYTES = 400_000  # of a sound or video that a page carries whole; images are always thumbnails
MAX_SIDE = 320  # pixels of a thumbnail
FRAMES, BARS = 4, 72  # of a video's film strip; of a sound's outline


@dataclass(frozen=True)
class Embedded:
    """A media item on the page. `uri` plays or shows it; `picture` is what can be seen of a sound or a video unplayed.

    `tiny` asks for sharp pixels when enlarged; `note` says why something is missing.
    """

    kind: str
    uri: str | None = None
    picture: Markup | str | None = None
    tiny: bool = False
    note: str | None = None


def embed(path: Path) -> Embedded:
    """Never raises for a bad file: a report shows what there is."""
    suffix = path.suffix.lower()
    kinds: list[Kind] = [kind for kind in KINDS if suffix in SUFFIXES[kind]]
    if not kinds:
        return Embedded("other", note=f"{path.name}: a {suffix or 'nameless'} file is not shown")
    [kind] = kinds
    try:
        media = Media(kind, path, path.name)
        if kind == "image":
            return _image(decode_image(media))
        uri = data_uri(path.read_bytes(), SUFFIXES[kind][suffix]) if path.stat().st_size <= MAX_BYTES else None
        note = None if uri else f"{path.name} ({path.stat().st_size / 1e6:.1f} MB) is too large to play here"
        if kind == "audio":
            return Embedded(kind, uri, _outline(decode_audio(media)), note=note)
        strip, tiny = _film_strip(decode_video(media))
        return Embedded(kind, uri, strip, tiny, note)
    except MediaError as error:
        return Embedded(kind, note=str(error))


def _image(pixels: Tensor) -> Embedded:
    """`pixels` (3, H, W) uint8."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    tiny = max(image.size) <= MAX_SIDE // 2
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return Embedded("image", encoded(image), tiny=tiny)


def _film_strip(clip: VideoClip) -> tuple[str, bool]:
    """Frames from the middle of each quarter of a clip, side by side."""
    frames = clip.frames_at([(i + 0.5) / FRAMES * clip.duration for i in range(FRAMES)])
    tiny = max(clip.size) <= MAX_SIDE // 2
    gap = max(1, frames.shape[3] // 24)
    frames = F.pad(frames, (0, gap), value=255)  # a white bar right of each frame
    strip = Image.fromarray(frames.permute(2, 0, 3, 1).flatten(1, 2)[:, :-gap].numpy())
    strip.thumbnail((2 * MAX_SIDE, MAX_SIDE))
    return encoded(strip), tiny


def _outline(sound: Waveform) -> Markup:
    mono = sound.samples.abs().amax(0)
    peaks = [chunk.max().item() for chunk in mono.tensor_split(BARS) if len(chunk)]
    loudest = max(peaks) or 1.0
    return plots.wave([peak / loudest for peak in peaks], label=f"sound of {len(mono) / sound.rate:.1f} s")


def encoded(image: Image.Image) -> str:
    """As a data URI: PNG where it is small (drawings), JPEG otherwise (photographs)."""
    choices = []
    for form, mime, options in (("PNG", "image/png", {"optimize": True}), ("JPEG", "image/jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        choices.append((buffer.getvalue(), mime))
    png, jpeg = choices
    return data_uri(*(png if len(png[0]) <= max(8_000, len(jpeg[0])) else jpeg))


def data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
