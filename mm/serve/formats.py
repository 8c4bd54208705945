"""Media formats by their first bytes: what a file is called, or says that it is, decides nothing."""

from __future__ import annotations

from mm.serve.limits import Refused
from mm.types import Kind

FORMATS: dict[Kind, tuple[str, ...]] = {
    "image": ("JPEG", "PNG", "GIF", "WebP"),
    "audio": ("WAV", "MP3", "FLAC", "OGG", "MP4", "WebM"),
    "video": ("MP4", "WebM"),
}
_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"fLaC": "FLAC",
    b"OggS": "OGG",
    b"ID3": "MP3",
}
_RIFF = {b"WEBP": "WebP", b"WAVE": "WAV"}
_EBML, _DOCTYPE = b"\x1a\x45\xdf\xa3", b"\x42\x82\x84webm"
_NEUTRAL = ("application/octet-stream", "binary/octet-stream", "application/ogg")


def format_of(data: bytes) -> str | None:
    """ "JPEG", "PNG", ...: by the first bytes; None for all other formats."""
    for start, name in _STARTS.items():
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12])
    if data[4:8] == b"ftyp":
        return "MP4"
    if data[:4] == _EBML and _DOCTYPE in data[:64]:  # Matroska at large is not taken
        return "WebM"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2:  # the start of an MPEG frame of layer III
        return "MP3"
    return None


def check_format(kind: Kind, data: bytes) -> str:
    """The format of a file of this kind; raises Refused if it is of none that is taken."""
    name = format_of(data)
    if name not in FORMATS[kind]:
        found = name or f"an unknown format that starts with {data[:12].hex(' ')}"
        raise Refused("unsupported_media_type", f"{kind} is {found}, not {', '.join(FORMATS[kind])}")
    return name


def check_declared(kind: Kind, declared: str | None) -> None:
    """Raises Refused where a MIME type ("image/png; q=1") speaks of another kind; none or a neutral one is fine."""
    mime = (declared or "").partition(";")[0].strip().lower()
    if mime and mime not in _NEUTRAL and mime.partition("/")[0] != kind:
        raise Refused("unsupported_media_type", f"{kind} is declared as {mime}")
