"""What a stranger may ask for, and how what goes beyond is refused: by a fixed code, with the details for the log."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import get_args

from mm.types import Kind

# code -> HTTP status, and the sentence that a client is told with it. Nothing else is.
CODES: dict[str, tuple[int, str]] = {
    "malformed_request": (400, "This is not HTTP as it is understood here."),
    "malformed_json": (400, "The body is not JSON in UTF-8."),
    "too_deep": (400, "The body is nested too deeply."),  # than json_depth
    "too_many_items": (400, "The request has too many media, or too many values."),  # than `items` or json_values
    "malformed_url": (400, "A data: URL is malformed."),
    "malformed_base64": (400, "Data is not base64."),
    "url_not_allowed": (400, "This URL may not be fetched: send a data: URL, or ask the operator to allow its host."),
    "url_not_fetched": (400, "The URL did not answer with a file in time."),
    "media_unreadable": (400, "A media file is damaged, cut short or empty."),
    "media_unsuitable": (400, "A media file can be read, but does not suit this model."),  # a sound too long for it
    "media_too_large": (413, "A media file has too many bytes, pixels, frames, samples or seconds."),
    "body_too_large": (413, "The body has too many bytes."),
    "unsupported_media_type": (415, "The body or a media file is of a type that is not taken, or not of its kind."),
    "decoding_failed": (422, "The decoder died of a media file."),
    "decoding_timeout": (422, "Decoding a media file took too long."),
    "decoder_busy": (503, "Every media decoder stayed busy; try again."),
    "missing_parameter": (400, "A parameter is missing."),
    "unknown_parameter": (400, "A parameter is not known here."),
    "invalid_value": (400, "A parameter's value, or a combination of parameters, is not possible."),
    "invalid_schema": (400, "The JSON schema cannot be followed."),
    "context_length_exceeded": (400, "The chat, its media and the answer do not fit into the model's context."),
    "host_not_allowed": (400, "The Host header names no address that this server answers for."),
    "invalid_api_key": (401, "The API key is missing or wrong."),
    "origin_not_allowed": (403, "Pages of other origins may not use this server."),
    "not_found": (404, "There is nothing at this address."),
    "model_not_found": (404, "This server has no such model; GET /v1/models lists what it has."),
    "file_not_found": (404, "There is no such file; it was never uploaded, or has been dropped since."),
    "method_not_allowed": (405, "This address does not take this method."),
    "body_timeout": (408, "The body did not arrive in time."),
    "too_many_requests": (429, "You have too many requests at work; try again when one has ended."),
    "internal_error": (500, "The server failed; its log says why, under this request's id."),
    "model_failed": (500, "The model gave no usable answer."),  # logits that are no numbers
    "not_supported": (501, "This model cannot do that."),  # embeddings without an alignment tower
    "server_busy": (503, "Every place is taken; try again."),
    "shutting_down": (503, "The server is going down."),
    "deadline_exceeded": (504, "The answer took longer than a request may."),
}
HOST = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*(?=[a-z0-9-]*[a-z])[a-z0-9-]{1,63}")
GRACE = 10.0  # seconds that a client has to read the end of an answer whose time is up
DETAIL = 500  # characters of the log's line


class Refused(Exception):
    """A request that is not served: `code` (of CODES), `status` and `param`, a field of the request's form, for the
    client; `detail` for the log alone."""

    def __init__(self, code: str, detail: str, param: str | None = None) -> None:
        super().__init__(code)
        self.code, self.param = code, param
        self.status = CODES[code][0]
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
    audio_bytes: int = 20_000_000
    audio_seconds: float = 300.0
    audio_samples: int = 30_000_000  # over all channels: five minutes of 48 kHz stereo
    video_bytes: int = 20_000_000
    video_seconds: float = 600.0
    video_frames: int = 36_000
    video_pixels: int = 9_000_000  # of a frame: 4096 x 2160
    items: int = 16  # media of a request, each frame of a list of frames counted
    body_bytes: int = 28_000_000  # 20 MB in base64, and the chat
    json_depth: int = 64
    json_values: int = 100_000
    hosts: tuple[str, ...] = ()
    redirects: int = 3
    fetch_seconds: float = 10.0  # from connecting to the last byte, redirects included
    decode_seconds: float = 30.0
    decode_memory: int = 2**30
    result_bytes: int = 2**27

    def __post_init__(self) -> None:
        others = ("hosts", "redirects")  # none are allowed
        _check_positive({name: value for name, value in asdict(self).items() if name not in others})
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


@dataclass(frozen=True)
class ServeLimits:
    """Who may have how much of the server at a time. Raises ValueError for a limit that is not positive.

    slots             requests at work, of all clients together; beyond them a client is told to come back
    per_client        of one client: of one address, as all share one key
    max_length        positions of a chat, its media and its answer
    answer_tokens     of an answer whose request does not say
    cache_tokens      positions kept at a time, of all answers that are written and for those that begin alike
    schema_bytes      of the JSON schema of an answer; those of tools that must be called count together
    choices           answers to one request (`n`)
    text_bytes        of all text in a request
    deadline_seconds  from the end of the body to the end of the answer
    held_bytes        bodies of all requests together, as they arrive and wait
    connections       open at a time; beyond them the one goes that has been silent longest and is not being answered
    upload_bytes      of files kept for requests to come, the oldest dropped first
    """

    slots: int = 16
    per_client: int = 8
    max_length: int = 4096
    answer_tokens: int = 512
    cache_tokens: int = 32_768
    choices: int = 8
    schema_bytes: int = 32_768  # making sense of 2,000 properties takes 2 s, of 9,000 more than a minute
    text_bytes: int = 1_000_000
    deadline_seconds: float = 120.0
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    held_bytes: int = 200_000_000
    connections: int = 512
    upload_bytes: int = 100_000_000

    def __post_init__(self) -> None:
        _check_positive(asdict(self))
        if self.cache_tokens < self.max_length:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} hold no chat of max_length={self.max_length}; give at least as many"
            )

    @property
    def request_seconds(self) -> float:
        """From the end of a request's head to the end of its answer, whatever its client does not send or read."""
        return self.body_seconds + self.deadline_seconds + 2 * GRACE


def _check_positive(limits: dict[str, float]) -> None:
    for name, value in limits.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: a limit is a positive number")
