"""Media that strangers send -> Media that the model's process can take: tokens, and no byte of the file.

open(kind, data) -> format by first bytes -> a child of nursery.py decodes and tokenises -> tokens, checked
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mm.serve.formats import check_declared, check_format
from mm.serve.limits import CODES, MediaLimits, Refused
from mm.types import KINDS, Grid, Kind, Media, MediaSpec, Tokens

STARTUP = 120.0  # seconds that loading the decoders may take
HEAD_BYTES = 1 << 14  # of what a decoder says about its result
WIDTH = 1 << 20  # values of a token
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
READY = b"+"  # says the nursery when it is, and a child's handle comes with it
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG")  # all that decoders get to see of the server's


class Failed(Exception):
    """A child ended, or was too slow, before it had answered."""


class MediaDecoder:
    """Decodes media in child processes, each file in one of its own. Thread-safe; a context manager.

    Args:
        specs: the model's `media_specs()`: their tokenizers make the tokens, in the child
        limits: see MediaLimits
        children: how many files are decoded at a time; others wait, for at most decode_seconds

    The decoders load in a process that is started here and is ready some seconds later; `wait` tells. Should that
    process be killed, the next file starts another.
    """

    def __init__(self, specs: Mapping[Any, MediaSpec], limits: MediaLimits | None = None, children: int = 2) -> None:
        if children < 1:
            raise ValueError(f"children={children}: at least one file must be decoded at a time")
        self.limits = limits or MediaLimits()
        self._tokenizers = {kind: spec.tokenizer for kind, spec in specs.items()}
        self._slots = threading.BoundedSemaphore(children)
        self._lock = threading.Lock()  # over the nursery: who talks to it, who starts another
        self._closed = False
        self._nursery: _Nursery | None = _Nursery(self._tokenizers, self.limits)

    def open(self, kind: Kind, data: bytes, declared: str | None = None) -> Media:
        """A file of `kind` as Media with tokens, named after its content. `declared`: its MIME type, if one was given.

        Raises Refused: unsupported_media_type, media_too_large, media_unreadable, media_unsuitable, decoding_failed,
        decoding_timeout, decoder_busy. RuntimeError where this machine cannot contain a decoder, or after `close`.
        """
        if kind not in self._tokenizers:
            raise Refused("unsupported_media_type", f"the model takes no {kind}")
        if len(data) > self.limits.bytes_of(kind):
            raise Refused("media_too_large", f"{len(data):,} bytes of {kind}, more than {self.limits.bytes_of(kind):,}")
        check_declared(kind, declared)
        check_format(kind, data)
        if not self._slots.acquire(timeout=self.limits.decode_seconds):
            raise Refused("decoder_busy", f"no decoder was free for {self.limits.decode_seconds:g} s")
        try:
            tokens = self._tokens(kind, data)
        finally:
            self._slots.release()
        return Media(kind, b"", f"{kind} {hashlib.blake2b(data, digest_size=8).hexdigest()}", tokens)

    def wait(self) -> None:
        """Returns when the decoders are loaded; RuntimeError, saying why, where they cannot be."""
        self._ready()

    def close(self) -> None:
        """Ends the decoders; files that are being decoded fail."""
        with self._lock:
            self._closed = True
            if self._nursery is not None:
                self._nursery.close()
                self._nursery = None

    def __enter__(self) -> MediaDecoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tokens(self, kind: Kind, data: bytes) -> Tokens:
        with self._child() as (job, handle):
            deadline = time.monotonic() + self.limits.decode_seconds
            try:
                _send(job, bytes([KINDS.index(kind)]) + len(data).to_bytes(8, "big"), deadline)
                _send(job, data, deadline)
                return _answer(job, self._tokenizers[kind].dim, self.limits, deadline)
            except TimeoutError:
                seconds = self.limits.decode_seconds
                raise Refused("decoding_timeout", f"decoding took longer than {seconds:g} s") from None
            except (Failed, OSError) as error:
                raise Refused("decoding_failed", f"the decoder died ({error or type(error).__name__})") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # it has ended, as it should
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    @contextlib.contextmanager
    def _child(self) -> Iterator[tuple[socket.socket, int]]:
        """The socket of a child that waits for a file, and the handle by which it is ended."""
        for _ in range(2):  # the nursery may have been killed since the last file
            nursery = self._ready()
            job, handle = nursery.child()
            if handle is not None:
                break
            job.close()
            self._give_up(nursery)
        else:
            raise Refused("decoding_failed", "the process that starts decoders ended twice in a row")
        try:
            yield job, handle
        finally:
            job.close()
            os.close(handle)

    def _ready(self) -> _Nursery:
        with self._lock:
            if self._closed:
                raise RuntimeError("the media decoder is closed")
            if self._nursery is None:
                self._nursery = _Nursery(self._tokenizers, self.limits)
            nursery = self._nursery
            try:
                nursery.wait()
            except RuntimeError:
                nursery.close()
                self._nursery = None
                raise
            return nursery

    def _give_up(self, nursery: _Nursery) -> None:
        with self._lock:
            if self._nursery is nursery:
                nursery.close()
                self._nursery = None


class _Nursery:
    """The process of nursery.py, seen from the server."""

    def __init__(self, tokenizers: Mapping[Any, Any], limits: MediaLimits) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        path = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # "" is the working folder
        one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}  # a fork keeps no other thread
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mm.serve.nursery", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment | one | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # an interrupt from the keyboard is the server's to handle
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(pickle.dumps((dict(tokenizers), limits)))
        self._ready = False

    def wait(self) -> None:
        if self._ready:
            return
        self._control.settimeout(STARTUP)
        try:
            said = self._control.recv(1 << 12)
        except TimeoutError:
            raise RuntimeError(f"the media decoder did not start within {STARTUP:.0f} s") from None
        if said != READY:
            reason = said.decode(errors="replace") or "its process ended while it started"
            raise RuntimeError(f"this machine cannot decode strangers' media safely: {reason}")
        self._ready = True

    def child(self) -> tuple[socket.socket, int | None]:
        """A new child's socket and handle; no handle if the nursery is gone, or does not answer."""
        ours, theirs = socket.socketpair()
        ours.settimeout(STARTUP)
        try:
            with theirs:
                socket.send_fds(self._control, [READY], [theirs.fileno()])
            handles = socket.recv_fds(ours, 1, 1)[1]
        except OSError:
            handles = []
        return ours, handles[0] if handles else None

    def close(self) -> None:
        """It has nothing to put in order; the kernel ends its children with it."""
        self._process.kill()
        self._process.wait()
        self._control.close()


def _answer(job: socket.socket, width: int, limits: MediaLimits, deadline: float) -> Tokens:
    """Nothing of it is believed: a file may have taken its decoder over."""
    size = int.from_bytes(_receive(job, 4, deadline), "big")
    if size > HEAD_BYTES:
        raise Failed(f"it announced {size:,} bytes about its result")
    try:
        told = dict(json.loads(_receive(job, size, deadline)))
        if "code" in told:
            raise Refused(told["code"] if told["code"] in CODES else "decoding_failed", str(told.get("detail")))
        t, h, w = told["grid"]
        grid: Grid = (int(t), int(h), int(w))
        dtype = DTYPES[told["dtype"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Failed(f"its answer makes no sense: {error}") from None
    total = math.prod(grid) * width * dtype.itemsize
    if min(grid) < 1 or told.get("width") != width or total > limits.result_bytes:
        raise Failed(f"it announced tokens {grid} x {told.get('width')}, {total:,} bytes")
    values = torch.frombuffer(_receive(job, total, deadline), dtype=dtype).view(-1, width)
    if dtype.is_floating_point and not bool(values.isfinite().all()):
        raise Failed("its tokens are not finite numbers")
    return Tokens.of_grid(values, grid)


def _send(job: socket.socket, data: bytes, deadline: float) -> None:
    job.settimeout(_left(deadline))
    job.sendall(data)


def _receive(job: socket.socket, size: int, deadline: float) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        job.settimeout(_left(deadline))
        count = job.recv_into(view)
        if count == 0:
            raise Failed("it ended without an answer")
        view = view[count:]
    return data


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left
