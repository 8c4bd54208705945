"""Generated videos: one shape that moves and may change its colour, with questions whose answers are exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mm.datasets.worlds import Attribute, Split, World, encode_mp4

SIDE = 48  # pixels
FRAMES = 16
FPS = 4
COLORS: dict[str, tuple[int, int, int]] = {  # those of easy-VQA
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
MOVES: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)


class VideoWorld(World):
    """Clips of 4 s, 48x48 px, 16 frames at 4 fps: a shape crosses the frame; its colour is drawn anew at 2 s."""

    kind = "video"
    suffix = ".mp4"
    attributes = (
        Attribute(
            "direction",
            tuple(MOVES),
            ("which way does the shape move?", "in which direction does the shape move?", "where does the shape go?"),
            ("does the shape move {}?", "is the shape moving {}?"),
        ),
        Attribute(
            "shape",
            ("circle", "triangle", "rectangle"),
            ("what shape is in the video?", "what shape is moving?", "what shape is present?"),
            ("is there a {}?", "is a {} present?"),
        ),
        Attribute(
            "first color",
            tuple(COLORS),
            ("what color is the shape at the start?", "what is the color of the shape at the start?"),
            ("is the shape {} at the start?",),
        ),
        Attribute(
            "last color",
            tuple(COLORS),
            ("what color is the shape at the end?", "what is the color of the shape at the end?"),
            ("is the shape {} at the end?",),
        ),
    )

    def __init__(
        self, n: int = 2000, split: Split = "train", seed: int = 0, branches: bool = True, captions: bool = False
    ) -> None:
        super().__init__(n, split, seed, branches, captions)

    def render(self, values: dict[str, str], rng: np.random.Generator) -> bytes:
        background = rng.integers(230, 256, 3)
        half = rng.uniform(7, 9, 2)  # of the shape's height and width
        if values["shape"] == "rectangle":  # clearly not a square: no question could tell a circle from one at 48 px
            half = np.array([5.5, 9.0]) if rng.random() < 0.5 else np.array([9.0, 5.5])
        elif values["shape"] == "circle":
            half[1] = half[0]
        step = np.array(MOVES[values["direction"]])
        middle = np.where(step == 0, rng.uniform(12, SIDE - 12, 2), SIDE / 2)
        reach = SIDE / 2 - 10
        along = np.linspace(-1, 1, FRAMES)[:, None]  # from one side to the other
        inside = _inside(values["shape"], middle + step * reach * along, half)
        shown = ["first color" if index < FRAMES // 2 else "last color" for index in range(FRAMES)]
        colors = np.array([COLORS[values[name]] for name in shown], np.uint8)[:, None, None]
        return encode_mp4(np.where(inside[..., None], colors, background.astype(np.uint8)), FPS)


def _inside(shape: str, centres: NDArray[np.floating], half: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(T, SIDE, SIDE) whether each pixel's middle lies in the shape; `centres` (T, 2) and `half` (2,) are (y, x)."""
    pixels = np.arange(SIDE) + 0.5
    y = ((pixels - centres[:, :1]) / half[0])[:, :, None]
    x = ((pixels - centres[:, 1:]) / half[1])[:, None, :]
    if shape == "circle":
        return y**2 + x**2 <= 1
    if shape == "triangle":
        return (y <= 1) & (2 * np.abs(x) <= y + 1)  # apex at the top, base at the bottom
    return (np.abs(y) <= 1) & (np.abs(x) <= 1)
