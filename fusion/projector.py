"""Projectors: every feature, or every cell of merged neighbours, becomes one position of the decoder's sequence.

`M` media items, `N` tokens of an item, `F` their width, `S` tokens merged into one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from mm.fusion.places import fourier
from mm.types import Bridge, Grid, Reduction, Tokens


class LinearProjector(Bridge):
    """One linear layer (LLaVA, arXiv:2304.08485): (M, N, in_dim) -> (M, N, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_values(self.linear(tokens.values.to(self.linear.weight.dtype)))


class MLPProjector(Bridge):
    """Two linear layers with GELU between (LLaVA-1.5, arXiv:2310.03744), after merging `shuffle` (t, h, w) neighbours.

    Merging concatenates the features of a cell of neighbours (pixel shuffle of InternVL-1.5, arXiv:2404.16821; 2x2
    merge of Qwen2-VL, arXiv:2409.12191), which quarters the tokens at (1, 2, 2). Where a grid is not divisible the
    missing neighbours are zeros. `hidden` is the middle width (default: out_dim). `norm` puts a LayerNorm before (as
    InternVL has) and after: an encoder's features share a large common part, which hides what tells them apart from a
    decoder that learns from scratch. `bands` adds so many Fourier features of the place in the grid: the frames of a
    video pass through an image encoder one by one, and nothing else in a feature says which frame it is of.

    (M, N, in_dim) -> (M, N', out_dim) with grid' = ceil(grid / shuffle).
    Raises ValueError for a shuffle below 1 or `bands` below 0.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        shuffle: tuple[int, int, int] = (1, 1, 1),
        hidden: int | None = None,
        norm: bool = False,
        bands: int = 0,
    ) -> None:
        super().__init__()
        t, h, w = shuffle
        if min(t, h, w) < 1:
            raise ValueError(f"shuffle must be three numbers (t, h, w) of at least 1, got {tuple(shuffle)}")
        if bands < 0:
            raise ValueError(f"bands must be at least 0, got {bands}")
        self.bands = bands
        self.reduction = Reduction((t, h, w))
        merged = in_dim * t * h * w
        self.norm_in = nn.LayerNorm(merged) if norm else nn.Identity()
        self.up = nn.Linear(merged + 6 * bands, hidden or out_dim)
        self.down = nn.Linear(hidden or out_dim, out_dim)
        self.norm_out = nn.LayerNorm(out_dim) if norm else nn.Identity()

    def forward(self, tokens: Tokens) -> Tokens:
        tokens = merge(tokens, self.reduction)
        x = self.norm_in(tokens.values.to(self.up.weight.dtype))
        if self.bands:
            x = torch.cat([x, fourier(tokens, self.bands).to(x.dtype)], dim=-1)
        return tokens.with_values(self.norm_out(self.down(nnf.gelu(self.up(x)))))


def merge(tokens: Tokens, reduction: Reduction) -> Tokens:
    """Concatenates the `S` tokens of every cell of `reduction.stride` neighbours: (M, N, F) -> (M, N', S * F).

    Within a cell the order is (t, h, w) raster; neighbours outside the grid are zeros.
    """
    if math.prod(reduction.stride) == 1:
        return tokens
    grids = [(t, h, w) for t, h, w in tokens.grid.tolist()]
    counts = [math.prod(reduction(grid)) for grid in grids]
    grid = -(-tokens.grid // tokens.grid.new_tensor(reduction.stride))
    positions, mask = raster(grid, max(counts, default=0))
    if len(set(grids)) == 1 and math.prod(grids[0]) == tokens.values.shape[1]:
        values = merge_uniform(tokens.values, grids[0], reduction)
    else:
        values = merge_ragged(tokens, grid, mask.shape[1], reduction)
    return Tokens(values, positions, mask, grid)


def merge_uniform(values: Tensor, grid: Grid, reduction: Reduction) -> Tensor:
    """All items have the same grid: pad it to whole cells, view it as cells, one transposing copy."""
    (st, sh, sw), (t, h, w) = reduction.stride, reduction(grid)
    x = values.unflatten(1, grid)
    if (t * st, h * sh, w * sw) != grid:
        x = nnf.pad(x, (0, 0, 0, w * sw - grid[2], 0, h * sh - grid[1], 0, t * st - grid[0]))
    x = x.reshape(len(x), t, st, h, sh, w, sw, values.shape[-1])
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(x), t * h * w, st * sh * sw * values.shape[-1])


def merge_ragged(tokens: Tokens, grid: Tensor, cells: int, reduction: Reduction) -> Tensor:
    """Every token goes to its place in its cell: `grid` (M, 3) are the merged grids, `cells` the most of any item."""
    size = math.prod(reduction.stride)
    stride = tokens.positions.new_tensor(reduction.stride)
    cell, part = tokens.positions // stride, tokens.positions % stride
    cell = (cell[..., 0] * grid[:, None, 1] + cell[..., 1]) * grid[:, None, 2] + cell[..., 2]
    part = (part[..., 0] * stride[1] + part[..., 1]) * stride[2] + part[..., 2]
    items, columns = tokens.mask.nonzero(as_tuple=True)
    x = tokens.values.new_zeros(len(tokens.values), cells * size, tokens.values.shape[-1])
    x = x.index_put((items, (cell * size + part)[items, columns]), tokens.values[items, columns])
    return x.reshape(len(x), cells, size * x.shape[-1])


def raster(grid: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Positions (M, length, 3) and mask (M, length) of items with these grids (M, 3), in raster order."""
    index = torch.arange(length, device=grid.device)
    t, h, w = (size[:, None] for size in grid.unbind(1))
    mask = index < t * h * w
    positions = torch.stack([index // (h * w), index // w % h, index % w], dim=-1)
    return positions * mask[..., None], mask
