"""The process that decodes for the server: it loads the decoders once and never reads a stranger's byte itself.

    server -- a socket per file --> nursery -- fork --> child: limits, walls, then decode -> tokens -> the same socket

Each file has a child of its own, so what one file does to its decoder, the next never meets. The child is shut in by
the sandbox's jail (memory, processor time, no files, no network, no other process) before it reads the first byte; its
parent gave it the socket and nothing else of the server's.

On the socket: `kind` (1 byte, an index into KINDS), length (8 bytes) and the file; then `report` (see below).
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import math
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import av  # noqa: F401  all that decoding needs is loaded here, once, before the walls are up
import simplejpeg  # noqa: F401
import soundfile
import torch
from PIL import Image

from mm.datasets.decode import Resizer, decode, open_image
from mm.datasets.video_clip import VideoClip
from mm.evaluation.sandbox.jail import Uncontained, shut_in
from mm.serve.limits import MediaLimits, Refused
from mm.serve.media import DTYPES, READY
from mm.types import KINDS, Kind, Media, MediaError, MediaTokenizer, MediaTooLarge, Tokens, grid_positions

HEAD = 9  # bytes before the file: kind and length


def main() -> None:
    """`python -m mm.serve.nursery FD`: FD is a SOCK_SEQPACKET socket, standard input the pickled tokenizers and limits.

    Says READY, or why it cannot work; then each message brings the socket of one file. Ends when the server does.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    tokenizers, limits = pickle.load(sys.stdin.buffer)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that end are forgotten
    Image.init()  # all its formats, which it would else look for in each child
    torch.set_num_threads(1)
    gc.freeze()  # collecting what all children share would copy it for each
    control.send(_trial(tokenizers, limits))
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with socket.socket(fileno=files[0]) as job:
            child = os.fork()
            if child == 0:
                control.close()
                _child(job, tokenizers, limits)
            _hand_over(job, child)


def _hand_over(job: socket.socket, child: int) -> None:
    """Gives the server what it needs to end the child: a number could be another process's by then."""
    try:
        handle = os.pidfd_open(child)
    except ProcessLookupError:  # it has ended: the server closed the socket
        return
    try:
        socket.send_fds(job, [READY], [handle])
    except OSError:  # the server has given up on this file
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


def _trial(tokenizers: Mapping[Kind, MediaTokenizer], limits: MediaLimits) -> bytes:
    """READY, or why children cannot be shut in on this machine."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, _shut_in(limits) or READY)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        return pipe.read() or b"the decoder died while it was shut in"


def _shut_in(limits: MediaLimits) -> bytes | None:
    memory = _mapped() + limits.decode_memory
    try:
        shut_in(ctypes.CDLL(None, use_errno=True), memory, 0, math.ceil(limits.decode_seconds) + 1, folder=None)
    except Uncontained as error:
        return str(error).encode()
    return None


def _mapped() -> int:
    """Bytes of address space in use: Python, the decoders and their libraries."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _child(job: socket.socket, tokenizers: Mapping[Kind, MediaTokenizer], limits: MediaLimits) -> None:
    """Never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what codecs print is the file's to choose
        walls = _shut_in(limits)
        assert walls is None, walls  # the trial has shown that they hold
        head = _read(job.fileno(), HEAD)
        data = _read(job.fileno(), int.from_bytes(head[1:], "big"))
        for part in report(KINDS[head[0]], data, tokenizers, limits):
            _write(job.fileno(), part)
    finally:
        os._exit(0)


def report(kind: Kind, data: bytes, tokenizers: Mapping[Kind, MediaTokenizer], limits: MediaLimits) -> list[Any]:
    """The answer: 4 bytes of length, JSON (code and detail, or grid, width and dtype), and the values' bytes."""
    values: Any = b""
    try:
        tokens = tokens_of(Media(kind, data, "file"), tokenizers[kind], limits)
        flat = tokens.values.contiguous().numpy()
        told = {"grid": tokens.grid.tolist(), "width": flat.shape[1], "dtype": flat.dtype.name}
        values = flat.tobytes()
    except Refused as error:
        told = {"code": error.code, "detail": error.detail}
    except Exception as error:
        told = {"code": "decoding_failed", "detail": "".join(traceback.format_exception(error))[-500:]}
    head = json.dumps(told).encode()
    return [len(head).to_bytes(4, "big"), head, values]


def tokens_of(media: Media, tokenizer: Any, limits: MediaLimits) -> Tokens:
    """What the model reads of a file. Raises Refused."""
    try:
        tokens = tokenizer(_decoded(media, tokenizer, limits))
    except MediaTooLarge as error:
        raise Refused("media_too_large", str(error)) from error
    except MediaError as error:
        raise Refused("media_unreadable", str(error)) from error
    except ValueError as error:  # what decoding raises is a MediaError: this is the tokenizer's
        raise Refused("media_unsuitable", str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch's way of saying it
            raise
        raise Refused("media_too_large", f"takes more than {limits.decode_memory:,} bytes to decode") from error
    t, h, w = tokens.grid.tolist()
    assert bool(tokens.mask.all()) and torch.equal(tokens.positions, grid_positions((t, h, w)))
    assert str(tokens.values.dtype).removeprefix("torch.") in DTYPES
    return tokens


def _decoded(media: Media, tokenizer: Any, limits: MediaLimits) -> Any:
    """Decoded as everywhere else, once the headers have shown that it is within the limits."""
    match media.kind:
        case "image":
            _check_image(media, limits)
        case "audio":
            _check_sound(media, limits)
        case "video":
            clip = decode(media, limits.video_pixels)
            assert isinstance(clip, VideoClip)
            _at_most("frames", len(clip.times), limits.video_frames)
            _at_most("seconds", clip.duration, limits.video_seconds)
            return clip
    resizer: Resizer | None = tokenizer if hasattr(tokenizer, "resize") else None
    return decode(media, limits.image_pixels, limits.audio_seconds, resizer)


def _check_image(media: Media, limits: MediaLimits) -> None:
    assert isinstance(media.data, bytes)
    with open_image(media.data, repr(media.name), limits.image_pixels) as image:
        _at_most("pixels a side", max(image.size), limits.image_side)
        _at_most("frames", getattr(image, "n_frames", 1), limits.image_frames)


def _check_sound(media: Media, limits: MediaLimits) -> None:
    """By libsndfile's headers; what only FFmpeg reads is counted while it is decoded."""
    assert isinstance(media.data, bytes)
    try:
        with soundfile.SoundFile(io.BytesIO(media.data)) as file:
            _at_most("samples", file.frames * file.channels, limits.audio_samples)
            _at_most("seconds", file.frames / max(1, file.samplerate), limits.audio_seconds)
    except soundfile.LibsndfileError:
        return


def _at_most(what: str, value: float, limit: float) -> None:
    if not value <= limit:
        raise MediaTooLarge(f"{value:,.0f} {what}, more than {limit:,}")


def _read(descriptor: int, size: int) -> bytes:
    """Through `read`: the calls that are made for sockets stand behind the walls."""
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError("the server closed the socket")
        data += part
    return bytes(data)


def _write(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


if __name__ == "__main__":
    main()
