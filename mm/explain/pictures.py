"""Pictures of an explanation: what the model saw, and heat over it, as PNG data URIs of one pixel a cell or patch.

A picture of several frames is a film strip: the frames side by side, at most FRAMES of them, evenly spread.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from mm.explain.explanation import SeenMedia
from mm.report.media import data_uri, encoded

FRAMES = 8
# From nothing to the most: dark blue, magenta, orange, pale yellow. It only gets lighter, so that it can be read in
# grey and by the colour-blind. Red, green, blue, opacity; the page's style.css draws the same scale.
HEAT = torch.tensor(
    [[20, 10, 80, 100], [140, 30, 130, 120], [230, 90, 60, 140], [250, 180, 50, 155], [255, 255, 170, 165]]
)


def shown_frames(count: int) -> list[int]:
    """Which of `count` frames a strip shows."""
    shown = min(count, FRAMES)
    return [(2 * i + 1) * count // (2 * shown) for i in range(shown)]


def picture(item: SeenMedia) -> str | None:
    """What the model saw; of a sound its spectrogram in grey, low notes at the bottom. None if it is no picture."""
    if item.picture is None:
        return None
    if item.kind == "audio":
        low, high = item.picture.aminmax()
        grey = ((item.picture - low) / (high - low).clamp(min=1e-9) * 235 + 10).byte().flip(0)
        return encoded(Image.fromarray(grey.numpy()))
    strip = item.picture[shown_frames(len(item.picture))].permute(2, 0, 3, 1).flatten(1, 2)
    return encoded(Image.fromarray(strip.contiguous().numpy()))


def heat(cells: Tensor, item: SeenMedia, top: float | None = None) -> str:
    """`cells` (t, h, w) of attention as an overlay of the picture, full where a cell has `top` (default: the most)."""
    grid = on_grid(cells, item)
    top = float(grid.max()) if top is None else top
    strip = grid.flatten(1).T if item.kind == "audio" else grid[shown_frames(len(grid))].permute(1, 0, 2).flatten(1)
    level = (strip / max(top, 1e-12)).clamp(0, 1) * (len(HEAT) - 1)
    below = level.floor().long().clamp(max=len(HEAT) - 2)
    colour = torch.lerp(HEAT[below].float(), HEAT[below + 1].float(), (level - below)[..., None])
    buffer = io.BytesIO()
    Image.fromarray(colour.round().byte().numpy(), "RGBA").save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")


def on_grid(cells: Tensor, item: SeenMedia) -> Tensor:
    """Cells (t, h, w) spread over the item's patches: the last ones may be only partly there."""
    for axis, (stride, size) in enumerate(zip(item.stride, item.grid, strict=True)):
        cells = cells.repeat_interleave(stride, axis).narrow(axis, 0, size)
    return cells


def cell_name(item: SeenMedia, cell: tuple[int, int, int]) -> str:
    """What a cell (t, h, w) is called: "row 1, column 4", "frame 2, row 1, column 4", "3.2 s", all counted from 1."""
    t, h, w = cell
    if item.kind == "audio":
        return f"part {t + 1} of {item.cells[0] if item.cells else '?'}"
    place = f"row {h + 1}, column {w + 1}"
    return f"frame {t + 1}, {place}" if item.kind == "video" else place
