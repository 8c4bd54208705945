"""What a stranger may ask for, and how what goes beyond is refused: by a fixed code, with the details for the log."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import get_args

from mm.types import Kind

# code -> HTTP status. The code is all that a client is told.
CODES: dict[str, int] = {
    "malformed_json": 400,
    "too_deep": 400,  # JSON nested deeper than json_depth
    "too_many_items": 400,  # more media than `items`, or more JSON values than json_values
    "malformed_url": 400,  # a data: URL that is none
    "malformed_base64": 400,
    "url_not_allowed": 400,  # scheme, host, port, address or redirect
    "url_not_fetched": 400,  # allowed, but it did not answer with a file in time
    "media_unreadable": 400,  # damaged, truncated, empty
    "media_unsuitable": 400,  # readable, but not for this model: its tokenizer takes no sound that long
    "media_too_large": 413,  # bytes, pixels, frames, samples, seconds, or memory to decode
    "body_too_large": 413,
    "unsupported_media_type": 415,  # not a format of its kind, or not of the kind that was declared
    "decoding_failed": 422,  # the decoder died of it
    "decoding_timeout": 422,  # decoding took longer than decode_seconds
    "decoder_busy": 503,  # every decoder stayed at work for decode_seconds
}
HOST = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*(?=[a-z0-9-]*[a-z])[a-z0-9-]{1,63}")
DETAIL = 500  # characters of the log's line


class Refused(Exception):
    """A request that is not served: `code` (of CODES) and `status` for the client, `detail` for the log alone."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code = code
        self.status = CODES[code]
        self.detail = "".join(c if c.isprintable() else " " for c in detail[:DETAIL])  # one line, whatever was sent


@dataclass(frozen=True)
class MediaLimits:
    """Bytes are of files as sent; pixels, frames, samples and seconds are checked before anything is decoded.

    hosts           names that media may be fetched from, exactly as in URLs; none: data: URLs and uploads only
    decode_memory   bytes that decoding one file may take
    decode_seconds  from handing a file to its decoder to having its tokens
    result_bytes    of one item's tokens

    Raises ValueError for a limit that is not positive, and for a host that is not a lower-case name.
    """

    image_bytes: int = 10_000_000
    image_side: int = 8_000
    image_pixels: int = 64_000_000
    image_frames: int = 1_000  # of an animation, of which the first is read
    audio_bytes: int = 25_000_000
    audio_seconds: float = 300.0
    audio_samples: int = 30_000_000  # over all channels: five minutes of 48 kHz stereo
    video_bytes: int = 25_000_000
    video_seconds: float = 600.0
    video_frames: int = 36_000
    video_pixels: int = 9_000_000  # of a frame: 4096 x 2160
    items: int = 16  # media of a request, each frame of a list of frames counted
    body_bytes: int = 40_000_000
    json_depth: int = 64
    json_values: int = 100_000
    hosts: tuple[str, ...] = ()
    redirects: int = 3
    fetch_seconds: float = 10.0  # from connecting to the last byte, redirects included
    decode_seconds: float = 30.0
    decode_memory: int = 2**30
    result_bytes: int = 2**27

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name not in ("hosts", "redirects")):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: a limit is a positive number")
        for host in self.hosts:
            if not HOST.fullmatch(host):
                raise ValueError(f"hosts: {host!r} is not a host name in lower case, such as images.example.org")

    def bytes_of(self, kind: Kind | None) -> int:
        """How large a file of this kind may be; of any kind, if it is not known yet."""
        return max(getattr(self, f"{each}_bytes") for each in ([kind] if kind else get_args(Kind)))


def check_items(count: int, limits: MediaLimits) -> None:
    """Raises Refused for a request with more media than it may have."""
    if count > limits.items:
        raise Refused("too_many_items", f"{count} media items, more than {limits.items}")
