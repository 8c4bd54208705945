"""Video -> patches of frames: frames are picked by time, and each goes through the image tokenizer.

Shape legend: `t` frames; `h`, `w` patches of a frame; `N = t * h * w` tokens.
"""

from __future__ import annotations

import math

import torch

from mm.tokenizers.image import ImageTokenizer
from mm.types import Clip, Grid, Tokens

_CHUNK = 8  # frames held at full size at a time: a minute of 1080p would be 370 MB


class VideoTokenizer:
    """Clip -> Tokens: values (N, 3*p*p) uint8, grid (t, h, w); the image tokenizer's budget holds for each frame.

    Time rule. A clip of d seconds gives t = round(d * fps) frames, at least 1 and at most `max_frames`. The clip is
    cut into t equal parts, and frame k is the one shown at the middle of its part, (k + 1/2) * d / t seconds. So a
    clip with more than `max_frames` is sampled evenly over its whole length, at a lower rate.

    `fps` is meant to be 1 to 4 (60 s at 1 fps with 256 tokens a frame is 15,360 tokens); 0.1 to 30 is allowed.
    Merging neighbouring frames is left to the bridge.
    """

    def __init__(self, image: ImageTokenizer, fps: float = 1.0, max_frames: int = 60) -> None:
        if not 0.1 <= fps <= 30:
            raise ValueError(f"fps={fps}: frames are taken 0.1 to 30 times a second, usually 1 to 4")
        if max_frames < 1:
            raise ValueError(f"max_frames={max_frames}: a clip is at least 1 frame")
        self.image = image
        self.fps = fps
        self.max_frames = max_frames
        self.patch = image.patch
        self.dim = image.dim

    def timestamps(self, duration: float) -> list[float]:
        """Seconds of the frames taken from a clip of `duration` seconds."""
        if not (math.isfinite(duration) and duration >= 0):
            raise ValueError(f"a clip cannot last {duration} seconds: its duration must be finite and not negative")
        frames = min(max(1, math.floor(duration * self.fps + 0.5)), self.max_frames)
        return [(k + 0.5) * duration / frames for k in range(frames)]

    def measure(self, media: Clip) -> Grid:
        _, h, w = self.image.grid_of(*media.size)
        return (len(self.timestamps(media.duration)), h, w)

    def count(self, media: Clip) -> int:
        return math.prod(self.measure(media))

    def __call__(self, media: Clip) -> Tokens:
        grid = self.measure(media)
        seconds = self.timestamps(media.duration)
        chunks = [seconds[start : start + _CHUNK] for start in range(0, len(seconds), _CHUNK)]
        values = [self.image.patches(media.frames_at(chunk), grid) for chunk in chunks]
        return Tokens.of_grid(torch.cat(values), grid)
