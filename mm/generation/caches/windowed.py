"""Caches of constant size: of each windowed layer what its window may still show; and attention sinks for the others.

Shape legend: `B` rows, `T` new positions, `C` slots that a ring has room for, `S` positions attended to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.decoder.attention.windows import StreamingSinks, Window
from mm.decoder.cache import SPARE, Cache, Shift
from mm.decoder.layout import Layout, Places


@dataclass
class Ring:
    """Slots for the `first` places of a row's document and, written over and over, the `last` ones.

    index   (B, C) int64  the place in the document of what a slot holds
    filled  (B, C) bool   False where it holds nothing yet
    total   (B,)   int64  places so far
    """

    first: int
    last: int
    index: Tensor
    filled: Tensor
    total: Tensor

    @staticmethod
    def of(window: int | StreamingSinks, rows: int, device: torch.device) -> Ring:
        first, last = (0, window) if isinstance(window, int) else (window.first, window.last)
        index = torch.zeros(rows, first + last, dtype=torch.long, device=device)
        return Ring(first, last, index, torch.zeros_like(index, dtype=torch.bool), index.new_zeros(rows))

    @property
    def used(self) -> int:
        """Slots in use: they fill from the first on."""
        return min(self.index.shape[1], int(self.total.max()))

    def slots(self, index: Tensor) -> Tensor:
        return torch.where(index < self.first, index, self.first + (index - self.first) % self.last)

    def places(self, used: int) -> Places:
        return Places(self.index[:, :used], self.filled[:, :used].long(), torch.zeros_like(self.index[:, :used]))

    def keep(self, rows: Tensor) -> None:
        self.index, self.filled, self.total = self.index[rows], self.filled[rows], self.total[rows]


@dataclass
class Pass:
    """What one forward pass does to a ring, worked out once for all layers that share it.

    rows, columns, slots  (N,) int64 of what is kept of the new: its row, its column of the pass, and where it goes
    before, used, room    slots in use before and after, and in all
    by                    (B,) int64: how far the sinks stand behind where they seem to stand; moves: if any does
    brings_sinks          whether some of the new are sinks
    layout                what a query sees: for one new position the ring, else the ring before it and the new ones
    """

    rows: Tensor
    columns: Tensor
    slots: Tensor
    before: int
    used: int
    room: int
    by: Tensor
    moves: bool
    brings_sinks: bool
    layout: Layout


class WindowedCache(Cache):
    """Bounded: layers with a sliding window (or streaming sinks) keep what it may still show. Exact.

    With `sinks`, every other attention layer keeps the first and last places only (StreamingLLM, Xiao et al. 2023,
    arXiv 2309.17453): the first ones seem to stand right before the last ones, so that no distance grows beyond what
    the model has learned. Sparse local+global layers keep everything.

    In a pass of several new positions the sinks stand where the first of them sees them.
    """

    def __init__(self, layers: int, sinks: StreamingSinks | None = None) -> None:
        super().__init__(layers)
        self.sinks = sinks
        self.rings: dict[Window, Ring] = {}
        self.keeps_all = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "places" and value is not None and not self.__dict__.get("keeps_all", True):
            value = _summary(value)  # nobody attends to these: only that something came before matters
        super().__setattr__(name, value)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        for ring in self.rings.values():
            ring.keep(rows)

    def drop_last(self, count: int) -> None:
        """Raises ValueError: what a window has lost does not come back."""
        raise ValueError("draft: this cache cannot take tokens back; use cache dynamic, int8 or int4")

    def extend(
        self, layer: int, layout: Layout, window: Window | None = None, shift: Shift | None = None, **new: Tensor
    ) -> tuple[Layout, Window | None, list[Tensor]]:
        kind = self.sinks if window is None else window
        if kind is None or not isinstance(kind, int | StreamingSinks):
            self.keeps_all = True
            return super().extend(layer, layout, window, shift, **new)
        step = layout.remember(("ring", kind), lambda: self._advance(kind, layout))
        first = self.rings[kind].first if window is None else 0
        keys, kept = next(iter(new)), self.layers[layer]
        if first and step.moves and shift is not None:
            # From what they were when they came, so that no error adds up.
            kept[keys][:, :first] = shift(kept["sinks"], step.by)
        tensors = [self._write(layer, name, x, step) for name, x in new.items()]
        if first and step.brings_sinks:
            kept["sinks"] = kept[keys][:, :first].clone()
        return step.layout, None if layout.queries.index.shape[1] == 1 else kind, tensors

    def _advance(self, kind: int | StreamingSinks, layout: Layout) -> Pass:
        places = layout.queries
        ring = self.rings.setdefault(kind, Ring.of(kind, len(places.index), places.index.device))
        real = places.document_ids > 0
        before, alone = ring.used, places.index.shape[1] == 1
        keys = ring.places(before).append(places) if before else places  # a copy of the ring, which is about to change
        fresh = bool((ring.total < ring.first).any())
        by = (ring.total + 1 - ring.first - ring.last).clamp(min=0)
        ring.total = torch.maximum(ring.total, (places.index + 1).masked_fill(~real, 0).amax(1))
        kept = real & ((places.index < ring.first) | (places.index >= ring.total[:, None] - ring.last))
        rows, columns = kept.nonzero(as_tuple=True)
        slots = ring.slots(places.index[rows, columns])
        ring.index[rows, slots], ring.filled[rows, slots] = places.index[rows, columns], True
        used = ring.used
        if alone:
            keys = ring.places(used)
            if kind == self.sinks and ring.first:
                index = keys.index.clone()
                index[:, : ring.first] += by[:, None]
                keys = Places(index, keys.document_ids, keys.branch_ids)
        seen = Layout(places, keys, layout.positions, layout.cross)
        return Pass(
            rows, columns, slots, before, used, ring.index.shape[1], by, before > 0 and bool(by.any()), fresh, seen
        )

    def _write(self, layer: int, name: str, x: Tensor, step: Pass) -> Tensor:
        """Puts what is kept of x (B, T, ...) into its slots; gives what the pass attends to (B, S, ...)."""
        kept = self.layers[layer].get(name)
        if kept is None or kept.shape[1] < step.used:
            room = min(step.room, max(step.used + SPARE, step.used * 3 // 2))
            grown = x.new_zeros(len(x), room, *x.shape[2:])
            if kept is not None:
                grown[:, : kept.shape[1]] = kept
            self.layers[layer][name] = grown
        buffer = self.layers[layer][name]
        seen = torch.cat([buffer[:, : step.before], x], 1) if x.shape[1] > 1 and step.before else x
        buffer[step.rows, step.slots] = x[step.rows, step.columns]
        return buffer[:, : step.used] if x.shape[1] == 1 else seen


def _summary(places: Places) -> Places:
    """(B, 1): the last place of each row stands for all of them."""
    real = places.document_ids > 0
    last = places.index.masked_fill(~real, 0).amax(1, keepdim=True)
    return Places(last, real.any(1, keepdim=True).long(), torch.zeros_like(last))
