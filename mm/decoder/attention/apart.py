"""Packed documents as rows of their own, for attention on a CPU without keys that no query sees.

Shape legend: `B` rows, `T` positions, `N` documents, `L` positions of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.decoder.layout import Layout, Places


@dataclass(frozen=True)
class Apart:
    """`layout` has a document a row, padding after it. `there` (N * L,) int64 says where in the rows each of its
    positions stands, `back` (B * T,) where in it each position of the rows; -1 for padding."""

    layout: Layout
    there: Tensor
    back: Tensor

    def take(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (N, L, ...), 0 at padding."""
        return _Move.apply(x, self.there, self.back).view(*self.layout.queries.index.shape, *x.shape[2:])  # type: ignore[no-any-return]

    def put(self, x: Tensor, layout: Layout) -> Tensor:
        """(N, L, ...) -> (B, T, ...) as they stood in that layout, 0 at padding."""
        return _Move.apply(x, self.back, self.there).view(*layout.queries.index.shape, *x.shape[2:])  # type: ignore[no-any-return]


def apart(layout: Layout) -> Apart | None:
    """The documents of a layout on a CPU, without a cache, as rows of their own, where those hold at most half as many
    pairs of a query and a key; once a forward pass."""
    return layout.remember("apart", lambda: _apart(layout))


def _apart(layout: Layout) -> Apart | None:
    rows, length = layout.queries.index.shape
    spans = [span for span in layout.documents() if not layout.is_padding(span[0], span[1])]
    longest = max((end - start for _, start, end in spans), default=0)
    if not spans or 2 * len(spans) * longest**2 > rows * length**2:
        return None
    begins = torch.tensor([row * length + start for row, start, _ in spans])
    lengths = torch.tensor([end - start for _, start, end in spans])
    steps = torch.arange(longest)
    there = torch.where(steps < lengths[:, None], begins[:, None] + steps, -1).reshape(-1)
    back = torch.full((rows * length,), -1)
    back[there[there >= 0]] = (there >= 0).nonzero()[:, 0]

    def taken(values: Tensor) -> Tensor:
        return _move(values.flatten(0, 1), there).view(len(spans), longest, *values.shape[2:])

    old = layout.queries
    places = Places(taken(old.index), taken((old.document_ids > 0).long()), taken(old.branch_ids))
    return Apart(Layout(places, places, taken(layout.positions)), there, back)


class _Move(torch.autograd.Function):
    """x (A, C, ...) -> (len(there), ...): its position there[i] at i, 0 where that is -1. `back` is the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.shape = x.shape
        return _move(x.flatten(0, 1), there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _move(grad, *ctx.saved_tensors).view(ctx.shape), None, None


def _move(x: Tensor, there: Tensor) -> Tensor:
    filled = there >= 0
    moved = x.index_select(0, there.clamp(min=0))
    return moved.masked_fill_(~filled.view(-1, *[1] * (x.ndim - 1)), 0)
