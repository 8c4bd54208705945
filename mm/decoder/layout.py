"""Who may attend to whom, said once a forward pass and shared by all layers.

Shape legend: `B` rows, `T` query positions, `S` key positions (with a cache, the cached ones and then the queries).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.attention.windows import Window, sees
from mm.types import CrossMedia, Sequence

_T = TypeVar("_T")
PADDING = 128  # positions of padding that count as one document of `Packed`: a block of the kernels' work


@dataclass
class Places:
    """Where positions stand: index, document_ids and branch_ids (B, S) as in Sequence."""

    index: Tensor
    document_ids: Tensor
    branch_ids: Tensor

    def append(self, more: Places) -> Places:
        return Places(
            torch.cat([self.index, more.index], 1),
            torch.cat([self.document_ids, more.document_ids], 1),
            torch.cat([self.branch_ids, more.branch_ids], 1),
        )

    def of(self, row: int, start: int, end: int) -> Places:
        """Those of one row, from `start` to `end`."""
        here = slice(row, row + 1), slice(start, end)
        return Places(self.index[here], self.document_ids[here], self.branch_ids[here])

    def keep(self, rows: Tensor) -> Places:
        """Those rows, in that order."""
        return Places(self.index[rows], self.document_ids[rows], self.branch_ids[rows])


@dataclass(frozen=True)
class Packed:
    """Documents of all rows laid one after another, (B * T,) positions: i stands at bounds[i] to bounds[i + 1].

    `bounds` (N + 1,) int32 is on the device, `longest` is the longest document's length. Padding must be in some
    document, and is in short ones, so that the work on it stays small; `padding` (B, T) bool says where, None: nowhere.
    """

    bounds: Tensor
    longest: int
    padding: Tensor | None


@dataclass
class Layout:
    """The geometry of one forward pass.

    A query sees a key when both stand in the same document, the key is not after the query, and the key's branch is the
    query's or the common part. Padding is document 0: it sees padding only, so no row of a softmax is empty.
    `positions` (B, T, 3) are the queries' multi-axis positions. `memo` keeps what layers derive (masks, rotary tables).
    """

    queries: Places
    keys: Places
    positions: Tensor
    cross: CrossMedia | None = None
    memo: dict[Hashable, object] = field(default_factory=dict)

    @staticmethod
    def of(sequence: Sequence, past: Places | None = None) -> Layout:
        here = Places(sequence.index, sequence.document_ids, sequence.branch_ids)
        return Layout(here, past.append(here) if past else here, sequence.positions, sequence.cross)

    def block(self, row: int, start: int, end: int, first: int, keep: bool) -> Layout:
        """Of one row the queries from `start` to `end`, and the keys from `first` up to the last of them; with `keep`
        the same for all layers, and with it the masks that they make of it."""

        def make() -> Layout:
            queries, keys = self.queries.of(row, start, end), self.keys.of(row, first, self.offset + end)
            return Layout(queries, keys, self.positions[row : row + 1, start:end])

        return self.remember(("block", row, start, end, first), make) if keep else make()

    @property
    def offset(self) -> int:
        """How many keys stand before the first query."""
        return self.keys.index.shape[1] - self.queries.index.shape[1]

    @cached_property
    def _on_host(self) -> tuple[Tensor, Tensor]:
        """The keys' document and branch ids on the CPU: all that the host asks of a pass costs one wait for a GPU."""
        ids = self.keys.document_ids, self.keys.branch_ids
        if ids[0].is_cpu:
            return ids
        documents, branches = torch.stack(ids).cpu()
        return documents, branches

    @cached_property
    def has_branches(self) -> bool:
        # With a cache nothing else is asked, and one bit travels faster than all that is cached.
        return bool((self.keys.branch_ids if self.offset else self._on_host[1]).any())

    @cached_property
    def is_plain_causal(self) -> bool:
        """True when a causal mask says it all: no cache, one document a row (padding after it), no branches."""
        if self.offset or self.has_branches:
            return False
        ids = self._on_host[0]
        real = ids > 0
        return bool((ids <= 1).all()) and bool((real[:, 1:] <= real[:, :-1]).all())

    def remember(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """`make()`, once per forward pass and key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]  # type: ignore[return-value]

    def mask(self, window: Window | None = None) -> Tensor:
        """(B, 1, T, S) bool, True where a query sees a key. An int hides keys that many or more places back."""
        return self.remember(("mask", window), lambda: self._mask(window))

    def _mask(self, window: Window | None) -> Tensor:
        q, k = self.queries, self.keys
        columns = torch.arange(k.index.shape[1], device=k.index.device)
        visible = columns[None, None, :] <= columns[None, self.offset :, None]
        visible = visible & (q.document_ids[:, :, None] == k.document_ids[:, None, :])
        if self.has_branches:
            branch = k.branch_ids[:, None, :]
            visible = visible & ((branch == 0) | (q.branch_ids[:, :, None] == branch))
        if window is not None:
            visible = visible & sees(window, q.index[:, :, None], k.index[:, None, :])
        return visible[:, None]

    def cross_mask(self) -> Tensor:
        """(B, 1, T, N) bool: which media beside the sequence each query sees. A query may see none."""

        def make() -> Tensor:
            assert self.cross is not None
            q, k = self.queries, self.cross
            visible = (q.document_ids[:, :, None] == k.document_ids[:, None, :]) & (k.document_ids[:, None, :] > 0)
            branch = k.branch_ids[:, None, :]
            visible = visible & ((branch == 0) | (q.branch_ids[:, :, None] == branch))
            return (visible & (k.index[:, None, :] <= q.index[:, :, None]))[:, None]

        return self.remember("cross_mask", make)

    def document_lengths(self) -> Tensor:
        """(B, T) int64: how long each query's document is so far, over all its branches; 0 at padding."""

        def make() -> Tensor:
            q, k = self.queries.document_ids, self.keys.document_ids
            longest = k.new_zeros(k.shape[0], int(k.max()) + 1)
            longest = longest.scatter_reduce(1, k, self.keys.index + 1, "amax")
            longest[:, 0] = 0
            return longest.gather(1, q)

        return self.remember("document_lengths", make)

    def is_padding(self, row: int, column: int) -> bool:
        """Whether a query stands in no document."""
        return int(self._on_host[0][row, column + self.offset]) == 0

    def documents(self) -> list[tuple[int, int, int]]:
        """(row, start, end) of every run of equal document ids, padding included, in raster order."""

        def make() -> list[tuple[int, int, int]]:
            ids = self._on_host[0]
            rows, starts = (axis.tolist() for axis in _begins(ids).nonzero(as_tuple=True))
            ends = [s if r == row else ids.shape[1] for r, s, row in zip(rows[1:], starts[1:], rows[:-1], strict=True)]
            return list(zip(rows, starts, [*ends, ids.shape[1]], strict=True))

        return self.remember("documents", make)

    def packed(self) -> Packed:
        """The same documents for a kernel of variable lengths. Only without a cache."""

        def make() -> Packed:
            ids = self._on_host[0]
            padding = ids == 0
            begins = _begins(ids)
            begins[:, ::PADDING] |= padding[:, ::PADDING]
            starts = begins.flatten().nonzero()[:, 0]
            bounds = F.pad(starts, (0, 1), value=ids.numel())
            device = self.keys.document_ids.device
            return Packed(
                bounds.int().to(device, non_blocking=True),
                int(bounds.diff().max()),
                self.keys.document_ids == 0 if bool(padding.any()) else None,
            )

        return self.remember("packed", make)


def _begins(ids: Tensor) -> Tensor:
    """(B, T) bool: where a run of equal ids begins."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins
