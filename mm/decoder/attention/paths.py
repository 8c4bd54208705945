"""What a recurrence runs along: each position's own past, through packed documents, branches, padding and a cache.

Attention sees the past through a mask; a recurrence carries a state from one position to the next and has to know which
that is. Shape legend: `B` rows, `T` positions of this pass, `R` runs (the positions of one document in one branch), `L`
positions of the longest run, `K` taps of a convolution, `C` channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.cache import Cache
from mm.decoder.layout import Layout

START, CACHED = -1, -2  # `previous` of a position that nothing comes before, and of one that goes on from the cache


@dataclass
class Paths:
    """Derived from a Layout once a forward pass.

    previous  (B, T) int64  column of the position before, along the document and its branch: a branch's first position
                            follows the last of the common part. START or CACHED where no column of this pass is it
    segment   (B, T) int64  counts the runs of a row: 0 until the first one begins, and where it goes on from the cache.
                            Padding belongs to the run before it, and must contribute nothing
    real      (B, T) bool   False at padding
    branch    (B, T) int64  0 for the common part

    A document stands in one piece, its common part first and then branch after branch, as rows are packed.
    """

    previous: Tensor
    segment: Tensor
    real: Tensor
    branch: Tensor
    has_branches: bool

    @staticmethod
    def of(layout: Layout, cache: Cache | None = None) -> Paths:
        """Raises ValueError for branches with a cache: a state that has gone on cannot go back to where they part."""
        if cache is not None and layout.has_branches:
            raise ValueError("a recurrent mixer (Mamba-2, linear attention) cannot keep a cache of rows with branches")
        return layout.remember("paths", lambda: _paths(layout))

    @cached_property
    def is_plain(self) -> bool:
        """True when every position follows the column before it, so that looking back is a shift."""
        columns = torch.arange(self.previous.shape[1], device=self.previous.device)
        follows = (self.previous == columns - 1) & (columns > 0)
        goes_on = (self.previous == CACHED) & (columns == 0)
        return bool((follows | goes_on | (self.previous == START) | ~self.real).all())

    @cached_property
    def runs(self) -> Runs:
        return _runs(self)

    def look_back(self, x: Tensor, tail: Tensor | None, taps: int) -> tuple[list[Tensor], Tensor]:
        """What stands 0, 1, ... K-1 places back along each path, (B, T, C) each, zero before a document's start.

        `x` (B, T, C); `tail` (B, K-1, C) is what came last before this pass. Also returns the tail after it.
        """
        rows, length, channels = x.shape
        before = x.new_zeros(rows, taps - 1, channels) if tail is None else tail.to(x.dtype)
        line = torch.cat([x.new_zeros(rows, 1, channels), before, x], 1)  # place 0 of it is "nothing"
        places, last = self._places(taps)
        if self.is_plain:
            shifted = [line[:, taps - back : taps - back + length] for back in range(1, taps)]
            looks = [
                part.masked_fill((place == 0)[..., None], 0.0) for part, place in zip(shifted, places, strict=True)
            ]
        else:
            looks = [_pick(line, place) for place in places]
        return [x, *looks], _pick(line, last)

    def _places(self, taps: int) -> tuple[list[Tensor], Tensor]:
        """Where `look_back` finds each: K-1 tables (B, T) into its line (1 zero, K-1 of the tail, T), and one (B, K-1)
        for the new tail."""
        rows, length = self.previous.shape
        device = self.previous.device
        previous = torch.where(self.previous >= 0, self.previous + taps, 0)
        previous = previous.masked_fill(self.previous == CACHED, taps - 1).masked_fill(~self.real, 0)
        old = (torch.arange(taps, device=device) - 1).clamp(min=0).expand(rows, taps)
        line = torch.cat([old, previous], 1)  # the place before each place of the line
        places = [previous]
        for _ in range(taps - 2):
            places.append(line.gather(1, places[-1]))
        columns = torch.arange(length, device=device)
        newest = torch.where(self.real, columns + taps, taps - 1).amax(1, keepdim=True)
        tail = [newest]
        for _ in range(taps - 2):
            tail.insert(0, line.gather(1, tail[0]))
        return places[: taps - 1], torch.cat(tail[: taps - 1], 1) if taps > 1 else newest[:, :0]


@dataclass
class Runs:
    """The runs as rows of their own: common parts first, then branches, each padded on the right.

    columns  two tables, (R1, L1) and (R2, L2) int64: where the positions stand in the flattened (B * T,) batch; padding
             holds B * T, one past the end
    parent   (R2,) int64: the common part, a row of the first table, from which each branch goes on; R1 where none is
    """

    columns: tuple[Tensor, Tensor]
    parent: Tensor


def _pick(line: Tensor, places: Tensor) -> Tensor:
    """line (B, S, C), places (B, T) -> (B, T, C)."""
    rows, size, _ = line.shape
    flat = places + size * torch.arange(rows, device=places.device)[:, None]
    return line.flatten(0, 1).index_select(0, flat.reshape(-1)).unflatten(0, places.shape)


def _paths(layout: Layout) -> Paths:
    document, branch = layout.queries.document_ids, layout.queries.branch_ids
    real = document > 0
    columns = torch.arange(document.shape[1], device=document.device).expand_as(document)

    def latest(flag: Tensor) -> Tensor:
        """The last flagged column before each one, -1 if none."""
        return F.pad(torch.where(flag, columns, -1).cummax(1).values[:, :-1], (1, 0), value=-1)

    def same_document(column: Tensor) -> Tensor:
        return real & (column >= 0) & (document.gather(1, column.clamp(min=0)) == document)

    before, common = latest(real), latest(real & (branch == 0))
    same_run = same_document(before) & (branch.gather(1, before.clamp(min=0)) == branch)
    previous = torch.where(same_run, before, torch.where(same_document(common), common, START))
    if layout.offset:
        past = layout.keys.document_ids[:, : layout.offset]
        place = torch.arange(layout.offset, device=past.device).expand_as(past)
        newest = torch.where(past > 0, place, 0).amax(1, keepdim=True)
        goes_on = real & (before < 0) & (past.gather(1, newest) == document)
        previous = previous.masked_fill(goes_on, CACHED)
    opens = real & ~same_run & (previous != CACHED)
    return Paths(previous, opens.long().cumsum(1), real, branch, layout.has_branches)


def _runs(paths: Paths) -> Runs:
    """Common parts and branches of all rows, gathered side by side."""
    rows, length = paths.segment.shape
    device = paths.segment.device
    run = paths.segment + (length + 1) * torch.arange(rows, device=device)[:, None]  # distinct across rows
    flat = torch.arange(rows * length, device=device).view(rows, length)
    tables, numbers = [], []
    for chosen in (paths.real & (paths.branch == 0), paths.real & (paths.branch > 0)):
        names, number = run[chosen].unique(return_inverse=True)
        counts = torch.bincount(number, minlength=len(names))
        place = torch.arange(len(number), device=device) - (counts.cumsum(0) - counts)[number]
        longest = max(1, int(counts.max()) if len(counts) else 0)
        table = torch.full((len(names), longest), rows * length, device=device)
        table[number, place] = flat[chosen]
        tables.append(table)
        numbers.append(torch.full((rows, length), -1, device=device).masked_scatter(chosen, number))
    common, branches = tables
    first = branches[:, 0]
    opener = paths.previous.reshape(-1)[first]  # a column of the same row, or START where a document has no common part
    parent = numbers[0].reshape(-1)[opener.clamp(min=0) + first // length * length]
    return Runs((common, branches), torch.where(opener >= 0, parent, len(common)))
