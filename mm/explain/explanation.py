"""What an explanation says: plain data, whatever shows it.

Shape legend: `S` steps (the answer's tokens, and the end where the model ended it), `T` positions of prompt and answer,
`N` media tokens beside the sequence, `Q` latents of a resampler, `K` experts a token, (t, h, w) cells of a media item.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mm.types import Grid


@dataclass(frozen=True)
class Step:
    """One step of the answer: the token that was taken, its probability under the model, and the likeliest ones, best
    first. `column` is the position that chose it: that of the token before."""

    text: str
    probability: float
    top: list[tuple[str, float]]
    column: int


@dataclass(frozen=True)
class Position:
    """A position of the sequence that the decoder read: its text, or the media item that it is a part of."""

    text: str
    modality: str
    part: Literal["prompt", "answer"]
    media: int | None = None


@dataclass(frozen=True)
class SeenMedia:
    """A media item as the model saw it.

    picture  image and video: (t, 3, H, W) uint8, the patches put together again; sound: (mels, frames) float32; None
             for tokens that are no picture
    grid     cells of the tokens, before any encoder
    cells    cells that attention is given over, and `stride`, how many of `grid` each of them covers; None where the
             item has no such cells any more
    places   (n, 3) int64, the cell of each token that is attended to (or read by a resampler)
    inline   the tokens stand in the sequence, from `start` to `stop`; otherwise beside it
    read     (Q, n) for a resampler, through whose latents the tokens are seen; else None
    """

    kind: str
    name: str
    picture: Tensor | None
    grid: Grid
    cells: Grid | None
    stride: Grid
    places: Tensor
    inline: bool
    start: int
    stop: int
    read: Tensor | None = None


@dataclass(frozen=True)
class LayerAttention:
    """What a layer attended to while each step was chosen, the mean of its heads: (S, T) of the sequence ("own"), or
    (S, N) of the media beside it ("beside")."""

    layer: int
    of: Literal["own", "beside"]
    weights: Tensor

    @property
    def name(self) -> str:
        return f"layer {self.layer}" + (", cross-attention" if self.of == "beside" else "")


@dataclass(frozen=True)
class LayerRouting:
    """Which of a layer's experts each position went to: indices (T, K) int64, their weights (T, K) float32, and taken
    (T, K) bool, False for a choice that was not carried out."""

    layer: int
    experts: int
    indices: Tensor
    weights: Tensor
    taken: Tensor

    def of(self, position: int) -> list[tuple[int, float]]:
        """(expert, weight) of a position, the heaviest first."""
        found = zip(*(x[position].tolist() for x in (self.indices, self.weights, self.taken)), strict=True)
        return sorted(((e, w) for e, w, taken in found if taken), key=lambda pair: -pair[1])


@dataclass(frozen=True)
class Explanation:
    """An answer, and how it came about. `rollout` (S, T) is None where there is none; `notes` say why something is
    missing."""

    question: str
    answer: str
    steps: list[Step]
    positions: list[Position]
    media: list[SeenMedia]
    attention: list[LayerAttention]
    routing: list[LayerRouting]
    rollout: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    def share(self, weights: Tensor, of: Literal["own", "beside"], media: int) -> Tensor | None:
        """(S,): how much of `weights` (S, T or N) lies on a media item; None if these weights do not see it."""
        item = self.media[media]
        return weights[:, item.start : item.stop].sum(1) if item.inline == (of == "own") else None

    def cells(self, weights: Tensor, of: Literal["own", "beside"], media: int) -> Tensor | None:
        """(S, t, h, w): `weights` (S, T or N) over the cells of a media item, through a resampler if there is one."""
        item = self.media[media]
        if item.cells is None or item.inline != (of == "own"):
            return None
        on_tokens = weights[:, item.start : item.stop]
        if item.read is not None:
            on_tokens = on_tokens @ item.read
        t, h, w = item.cells
        cell = (item.places * torch.tensor([h * w, w, 1])).sum(1)
        return torch.zeros(len(weights), t * h * w).index_add_(1, cell, on_tokens).view(-1, t, h, w)
