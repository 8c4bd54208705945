"""A video file whose frames are found by time: only the frames that are asked for are decoded.

Opening reads the container's packets without decoding them. That gives the exact time of every frame (so a variable
frame rate is right), the keyframes to seek to, and whether the file is whole.

Shape legend: `H`, `W` pixels of the upright frame.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mm.types import MediaError, MediaTooLarge

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Containers that hold their own data. Playlists (HLS, ffconcat, DASH, ...) make FFmpeg open other files and addresses,
# which a media file must never do.
MAX_FRAMES = 500_000  # 4.6 hours at 30 a second: the times of all are held in memory
MAX_SECONDS = 6 * 3_600.0
_FORMATS = "mov,matroska,avi,flv,mpeg,mpegts,asf,ogg,gif,apng,mp3,aac,ac3,wav,w64,flac,aiff,caf,amr,wv"


class VideoClip:
    """An opened video: the `Clip` of mm.types.

    duration  seconds, from the first frame to the end of the last
    size      (H, W) pixels as shown, after the file's rotation
    times     seconds of every frame after the first frame's, ascending

    Time 0 is the first frame, wherever the file's own clock starts. Raises MediaError, naming the file, when it is not
    a video, is truncated, has no frames, has frames of more than `max_pixels`, has more than MAX_FRAMES or MAX_SECONDS
    of them, or fails to decode later on.
    """

    def __init__(self, source: str | IO[bytes], label: str, max_pixels: int) -> None:
        self._label = label
        from av.video.reformatter import VideoReformatter

        with codec_errors(label, "is not a video that can be read, or is damaged"):
            self._container = open_container(source)
            self._stream = self._find_stream(max_pixels)
            self._index_packets()
        self._converter = VideoReformatter()
        self._playing: Iterator[tuple[int, VideoFrame]] = iter(())
        self._current: tuple[int, VideoFrame] | None = None  # the last frame decoded, and its time
        first = self._decode(self._stamps[0])
        height, width = self._coded_size = (first.height, first.width)
        self._quarter_turns = first.rotation // 90  # counterclockwise
        self.size = (width, height) if self._quarter_turns % 2 else (height, width)

    def frames_at(self, seconds: Sequence[float]) -> Tensor:
        """(len(seconds), 3, H, W) uint8: the frame shown at each time (the last frame at or before it).

        A time before the first frame gives the first, a time after the end gives the last. Times may come in any
        order; ascending calls go on from where the last one stopped.
        """
        if not seconds:
            return torch.empty((0, 3, *self.size), dtype=torch.uint8)
        # A nanosecond of slack: 3 / 10 s divided by the stream's unit must not fall just before frame 3.
        wanted = [max(0, bisect_right(self.times, second + 1e-9) - 1) for second in seconds]
        pixels = {index: self._pixels(self._decode(self._stamps[index])) for index in sorted(set(wanted))}
        return torch.stack([pixels[index] for index in wanted])

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> VideoClip:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find_stream(self, max_pixels: int) -> VideoStream:
        from av.stream import Disposition

        for stream in self._container.streams.video:
            if stream.disposition & Disposition.attached_pic:  # the cover of a song is not a video
                continue
            height, width = stream.codec_context.height, stream.codec_context.width
            if height * width > max_pixels:
                raise MediaTooLarge(f"{self._label} has frames of {width} x {height} pixels, more than {max_pixels:,}")
            stream.codec_context.thread_count = 1  # loader workers are the parallelism
            return stream
        raise MediaError(f"{self._label} has no frames: it has no video track")

    def _index_packets(self) -> None:
        """Reads the times of all frames and keyframes, in the stream's own unit, and checks that all are there."""
        self._keys: list[tuple[int, int]] = []  # (time shown, time decoded) of every keyframe
        decoded: list[int] = []  # time decoded, of every frame
        shown: list[tuple[int, int]] = []  # (time shown, duration), without what the file's edit list cuts away
        stamped = True
        for packet in self._container.demux(self._stream):
            if packet.size == 0:  # the end
                continue
            if packet.is_corrupt:
                raise MediaError(f"{self._label} is truncated or damaged after {len(decoded)} frames")
            stamp, decoding = _stamps(packet)
            decoded.append(decoding)
            if len(decoded) > MAX_FRAMES:
                raise MediaTooLarge(f"{self._label} has more than {MAX_FRAMES:,} frames; cut it into pieces")
            stamped &= packet.pts is not None
            if packet.is_keyframe:
                self._keys.append((stamp, decoding))
            if not packet.is_discard:
                shown.append((stamp, packet.duration or 0))
        if len(decoded) < self._stream.frames:
            raise MediaError(f"{self._label} is truncated: it has {len(decoded)} of {self._stream.frames} frames")
        if not shown:
            raise MediaError(f"{self._label} has no frames")
        shown.sort()
        self._keys.sort()
        self._start = min(decoded)
        # AVI stores frames in decoding order without saying when each is shown: with B-frames the orders differ.
        reordered = self._container.format.name == "avi" and self._stream.codec_context.has_b_frames
        self._in_order = reordered or not stamped
        self._stamps = [stamp for stamp, _ in shown]
        unit = float(self._stream.time_base or 1)
        self.times = [(stamp - self._stamps[0]) * unit for stamp in self._stamps]
        length = self._stamps[-1] - self._stamps[0]
        self.duration = (length + (shown[-1][1] or length / max(1, len(shown) - 1))) * unit
        if not 0 <= self.duration <= MAX_SECONDS:
            raise MediaTooLarge(f"{self._label} lasts {self.duration:.0f} s, more than {MAX_SECONDS:g}; cut it up")

    def _decode(self, stamp: int) -> VideoFrame:
        """The frame shown at `stamp`: decoded from where decoding stands, or from the keyframe before it."""
        with codec_errors(self._label, "is damaged: a frame cannot be decoded"):
            at = 0 if self._in_order else bisect_right(self._keys, (stamp, math.inf))
            key, decoding = self._keys[at - 1] if at else (self._start, self._start)
            frame = None
            if self._current is not None and key <= self._current[0] <= stamp:
                frame = self._forward(stamp)
            # MP4 and Matroska are sought by the time shown, others by the time decoded; some miss, and go past it.
            for start in (key, decoding, self._start):
                if frame is None:
                    self._seek(start)
                    frame = self._forward(stamp)
        if frame is None:
            second = self.times[self._stamps.index(stamp)]
            raise MediaError(f"{self._label} is damaged: its frame at {second:.3f} s cannot be decoded")
        return frame

    def _seek(self, stamp: int) -> None:
        self._container.seek(stamp, stream=self._stream)
        frames = self._container.decode(self._stream)
        if self._in_order:  # always from the start then
            self._playing = zip(self._stamps, frames, strict=False)
        else:
            self._playing = ((frame.pts, frame) for frame in frames if frame.pts is not None)
        self._current = None

    def _forward(self, stamp: int) -> VideoFrame | None:
        """Decodes up to `stamp`; None if no frame has exactly that time."""
        while self._current is None or self._current[0] < stamp:
            self._current = next(self._playing, None)
            if self._current is None:
                return None
        return self._current[1] if self._current[0] == stamp else None

    def _pixels(self, frame: VideoFrame) -> Tensor:
        height, width = self._coded_size  # a frame of another size, where a stream changes its own, is resized
        # One converter for the clip: a new one a frame, with threads of its own, takes longer than decoding.
        rgb = self._converter.reformat(frame, format="rgb24", height=height, width=width, threads=1).to_ndarray()
        return torch.from_numpy(np.rot90(rgb, self._quarter_turns).copy()).permute(2, 0, 1)


def _stamps(packet: Packet) -> tuple[int, int]:
    """When the packet's frame is shown and when it is decoded; each stands in for the other where only one is given."""
    shown = packet.dts if packet.pts is None else packet.pts
    if shown is None:
        raise ValueError("its frames carry no times")
    return shown, shown if packet.dts is None else packet.dts


def open_container(source: str | IO[bytes]) -> InputContainer:
    """FFmpeg's view of a media file that stands alone; the caller closes it."""
    import av

    return av.open(source, mode="r", options={"format_whitelist": _FORMATS})


@contextmanager
def codec_errors(label: str, why: str) -> Iterator[None]:
    """Whatever a codec raises on damaged bytes, as a MediaError `label why (what it said)` of one line."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, IndexError, ...: they differ by codec
        if isinstance(error, MemoryError) and not hasattr(error, "errno"):
            raise  # the machine's, not that of FFmpeg, which so refuses the sizes that a damaged header asks for
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        said = " ".join(said.split())
        raise MediaError(f"{label} {why} ({said})") from error
