"""Video patches: frames by time, evenly, within the budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.tokenizers.image import ImageTokenizer
from mm.tokenizers.video import VideoTokenizer


class Ticks:
    """A clip whose frame at t seconds is grey 10 * t."""

    def __init__(self, duration: float, size: tuple[int, int] = (16, 24)) -> None:
        self.duration, self.size, self.largest_read = duration, size, 0

    def frames_at(self, seconds: Sequence[float]) -> Tensor:
        self.largest_read = max(self.largest_read, len(seconds))
        shades = torch.tensor([int(10 * second) % 256 for second in seconds], dtype=torch.uint8)
        return shades[:, None, None, None].expand(-1, 3, *self.size)


@settings(max_examples=40, deadline=None)
@given(
    st.just(0.0) | st.floats(0.01, 200),
    st.floats(0.1, 30),
    st.integers(1, 12),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(1, 12),
)
def test_count_equals_tokens(duration: float, fps: float, frames: int, size: tuple[int, int], budget: int) -> None:
    tokenizer = VideoTokenizer(ImageTokenizer(patch=8, max_tokens=budget), fps=fps, max_frames=frames)
    clip = Ticks(duration, size)
    tokens = tokenizer(clip)
    t, h, w = tokenizer.measure(clip)
    assert tokenizer.count(clip) == len(tokens) == t * h * w
    assert 1 <= t <= frames and h * w <= budget
    assert tuple(tokens.grid.tolist()) == (t, h, w)
    times = tokenizer.timestamps(duration)
    assert times == sorted(times) and (duration == 0 or 0 < times[0] <= times[-1] < duration)


def test_frames_are_the_middles_of_equal_parts() -> None:
    tokenizer = VideoTokenizer(ImageTokenizer(patch=8), fps=2.0, max_frames=60)
    assert tokenizer.timestamps(2.0) == [0.25, 0.75, 1.25, 1.75]
    tokens = tokenizer(Ticks(2.0))
    assert tokens.values.reshape(4, -1).float().mean(dim=1).tolist() == [2, 7, 12, 17]
    assert tokens.positions[:, 0].reshape(4, -1).float().mean(dim=1).tolist() == [0, 1, 2, 3]


def test_a_long_clip_is_sampled_over_its_whole_length() -> None:
    tokenizer = VideoTokenizer(ImageTokenizer(patch=8), fps=4.0, max_frames=4)
    assert tokenizer.timestamps(80.0) == [10, 30, 50, 70]


def test_a_clip_shorter_than_a_frame_has_one() -> None:
    tokenizer = VideoTokenizer(ImageTokenizer(patch=8))
    assert tokenizer.timestamps(0.1) == [0.05]
    assert tokenizer.timestamps(0.0) == [0.0]
    with pytest.raises(ValueError, match="nan"):
        tokenizer.timestamps(float("nan"))


def test_few_full_size_frames_are_held_at_once() -> None:
    clip = Ticks(60.0)
    tokenizer = VideoTokenizer(ImageTokenizer(patch=8), fps=1.0)
    assert len(tokenizer(clip)) == 60 * 6
    assert clip.largest_read <= 8


@pytest.mark.parametrize("options", [{"fps": 0.05}, {"fps": 31.0}, {"fps": float("nan")}, {"max_frames": 0}])
def test_wrong_options(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VideoTokenizer(ImageTokenizer(), **options)
