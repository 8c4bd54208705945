"""The static cache: tensors of a fixed length, made beforehand, so that a decoding step can be compiled as one piece.

Eager decoding spends more time between the products than in them as soon as a model is small or its memory fast. Here
torch.compile makes one program of a step, in which nothing is copied or allocated but a token's own keys and values.

Shape legend: `B` rows, `T` new positions, `L` positions that there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.decoder.attention.windows import Window, sees
from mm.decoder.cache import Cache, Shift
from mm.decoder.layout import Layout, Places
from mm.generation.caches.graph import Capture, StepGraph
from mm.types import Sequence

ROOM = 64  # positions: room is made in multiples of it, and for an eighth more than there are


@dataclass
class StaticLayout(Layout):
    """Queries at `columns` (T,) int64 of the keys. Later keys are not written yet: document 0, which nobody sees."""

    columns: Tensor = None  # type: ignore[assignment]
    has_branches: ClassVar[bool] = False  # type: ignore[misc]
    is_plain_causal: ClassVar[bool] = False  # type: ignore[misc]

    def _mask(self, window: Window | None) -> Tensor:
        q, k = self.queries, self.keys
        columns = torch.arange(k.index.shape[1], device=k.index.device)
        visible = columns[None, None, :] <= self.columns[None, :, None]
        visible = visible & (q.document_ids[:, :, None] == k.document_ids[:, None, :])
        if window is not None:
            visible = visible & sees(window, q.index[:, :, None], k.index[:, None, :])
        return visible[:, None]


class StaticCache(Cache):
    """Keeps everything. The prompts are read as they are; every single token after them by `compiled`, a model's step.

    Rows that end keep their place and are computed along with the others, so that one program serves a generation:
    `alive` (b,) int64 are those of the B rows that the caller still knows. With `capture` steps are graphs.
    """

    def __init__(
        self, layers: int, compiled: Callable[[Tensor, Cache], Tensor], capture: Capture | None = None
    ) -> None:
        super().__init__(layers)
        self._compiled = compiled
        self._graph = None if capture is None else StepGraph(compiled, capture)
        self._stepping = False
        self._alive: Tensor | None = None  # None: all
        self._length = 0
        self._marked: Tensor | None = None
        self.column = self.index = self.documents = torch.zeros(0, dtype=torch.long)  # made by the first pass

    def __len__(self) -> int:
        return self._length

    def step(self, function: Callable[[Tensor, Cache], Tensor], ids: Tensor) -> Tensor:
        self._make_room(1)
        if self._marked is not self.index:  # the tensors are new; more room must not be another program
            for x in (self.index, self.documents, *(x for layer in self.layers for x in layer.values())):
                torch._dynamo.mark_dynamic(x, 1)
            self._marked = self.index
        alive, self._alive, self._stepping = self._alive, None, True
        try:
            if alive is not None:
                ids = ids.new_zeros(len(self.index)).index_copy(0, alive, ids)
            logits = self._compiled(ids, self) if self._graph is None else self._graph(ids, self, self.index)
        finally:
            self._alive, self._stepping = alive, False
        self._length += 1
        return logits if alive is None else logits[alive]

    def begin(self, sequence: Sequence) -> Layout:
        here = Places(sequence.index, sequence.document_ids, sequence.branch_ids)
        if not self.layers[0]:
            rows, length = here.index.shape
            self.index = here.index.new_zeros(rows, _room(length))
            self.documents = self.index.clone()
            self.index[:, :length], self.documents[:, :length] = here.index, here.document_ids
            self.column = torch.full_like(self.index[0, :1], length)
            self._length = length
            return Layout.of(sequence)
        new = here.index.shape[1]
        if not self._stepping:  # a step's caller has counted: its program knows tensors only
            self._make_room(new)
            self._length += new
        columns = self.column + torch.arange(new, device=self.index.device)
        self.index.index_copy_(1, columns, here.index)
        self.documents.index_copy_(1, columns, here.document_ids)
        self.column.add_(new)
        keys = Places(self.index, self.documents, torch.zeros_like(self.index))
        return StaticLayout(here, keys, sequence.positions, sequence.cross, columns=columns)

    def end(self, layout: Layout) -> None:
        """All is written."""

    def extend(
        self, layer: int, layout: Layout, window: Window | None = None, shift: Shift | None = None, **new: Tensor
    ) -> tuple[Layout, Window | None, list[Tensor]]:
        kept = self.layers[layer]
        for name, x in new.items():
            if isinstance(layout, StaticLayout):
                kept[name].index_copy_(1, layout.columns, x)
            else:
                kept[name] = x.new_zeros(len(x), self.index.shape[1], *x.shape[2:])
                kept[name][:, : x.shape[1]] = x
        return layout, window, [kept[name] for name in new] if isinstance(layout, StaticLayout) else list(new.values())

    def keep(self, rows: Tensor) -> None:
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        chosen = rows if self._alive is None else self._alive[rows]
        if len(chosen) < len(self.index) and bool((chosen.diff() > 0).all()):
            self._alive = chosen
            return
        super().keep(chosen)
        self.index, self.documents, self._alive = self.index[chosen], self.documents[chosen], None

    def drop_last(self, count: int) -> None:
        self._length -= count
        self.column.sub_(count)
        self.documents[:, self._length : self._length + count] = 0
        if self.next_index is not None and self.next_position is not None:
            self.next_index, self.next_position = self.next_index - count, self.next_position - count

    def _make_room(self, new: int) -> None:
        room = self.index.shape[1]
        if self._length + new <= room:
            return
        more = _room(max(self._length + new, room * 9 // 8)) - room
        grow = lambda x: torch.cat([x, x.new_zeros(len(x), more, *x.shape[2:])], 1)  # noqa: E731
        self.index, self.documents = grow(self.index), grow(self.documents)
        self.layers = [{name: grow(x) for name, x in layer.items()} for layer in self.layers]


def _room(length: int) -> int:
    """Positions to make room for: at least one more than `length`."""
    return (length // ROOM + 1) * ROOM
