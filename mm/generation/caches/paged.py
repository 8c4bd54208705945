"""The paged cache: requests of any length share one store, and what begins alike is computed and kept once.

After PagedAttention (Kwon et al. 2023, arXiv 2309.06180). Positions live in pages of a fixed size; a request's table
lists its pages. A full page is known by what stands in it and before it, so another request that begins the same way
takes it as it is. Shape legend: `R` rows of a pass, `T` new positions, `S` positions attended to.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mm.decoder.attention.windows import Window
from mm.decoder.cache import Cache, Shift
from mm.decoder.layout import Layout, Places


class OutOfPages(Exception):
    """Every page is in use."""


@dataclass
class Table:
    """One request's pages, in order; how many positions are written; `key` of its last full page that is known."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    registered: int = 0
    key: bytes = b""
    states: list[dict[str, Tensor]] | None = None  # of recurrent layers, one row each
    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # see Pages.slots


class Pages:
    """The store: `count` pages of `size` positions for each tensor of each layer, made when first written to.

    A page that no table uses any more keeps its content until the room is needed, the longest unused first. With
    `grows` the store doubles when all pages are in use, and `OutOfPages` is never raised.
    """

    def __init__(self, layers: int, count: int, size: int = 16, grows: bool = False) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"Pages: count {count} and size {size} must be at least 1")
        self.count, self.size, self.grows = count, size, grows
        self.pools: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self._free = list(range(count - 1, -1, -1))
        self._uses = [0] * count
        self._known: OrderedDict[bytes, int] = OrderedDict()  # key -> page, longest unused first
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones, and known ones that nobody uses."""
        return len(self._free) + sum(1 for page in self._known.values() if not self._uses[page])

    @property
    def used(self) -> int:
        """Pages in some request's table."""
        return sum(1 for uses in self._uses if uses)

    @property
    def sound(self) -> bool:
        """Whether no page is lost or has two owners while none is in use: a KeyboardInterrupt can come at any line."""
        known = list(self._known.values())
        unlisted = {page: key for key, page in self._known.items()} == self._key_of
        return unlisted and not any(self._uses) and sorted([*self._free, *known]) == list(range(self.count))

    def share(self, table: Table, identities: Sequence[Any]) -> int:
        """Puts the known pages that the request begins with into its empty table; returns how many positions that is,
        at least one less than there are: the last has to be read for what follows it."""
        for start in range(0, len(identities) - self.size, self.size):
            key = self._key(table.key, identities[start : start + self.size])
            page = self._known.get(key)
            if page is None:
                break
            self._known.move_to_end(key)
            self._uses[page] += 1
            table.pages.append(page)
            table.key, table.registered = key, table.registered + 1
        table.length = table.registered * self.size
        return table.length

    def reserve(self, table: Table, length: int) -> None:
        """Pages for `length` positions in all. Raises OutOfPages, the table as it was, where there are not enough."""
        needed = -(-length // self.size) - len(table.pages)
        if needed > len(self._free) and needed > self.available:  # the second counts every page that is known
            if not self.grows:
                raise OutOfPages(f"{needed} pages are needed and {self.available} are to be had")
            self._grow(max(2 * self.count, self.count + needed))
        table.pages += [self._take() for _ in range(needed)]

    def _grow(self, count: int) -> None:
        for pool in self.pools:
            for name, kept in pool.items():
                pool[name] = kept.new_zeros(count * self.size, *kept.shape[1:])
                pool[name][: len(kept)] = kept
        self._free = [*range(count - 1, self.count - 1, -1), *self._free]  # the old ones go first
        self._uses += [0] * (count - self.count)
        self.count = count

    def _take(self) -> int:
        if not self._free:
            key = next(key for key, page in self._known.items() if not self._uses[page])
            page = self._known.pop(key)
            del self._key_of[page]
            self._free.append(page)
        page = self._free.pop()
        self._uses[page] = 1
        return page

    def slots(self, table: Table, device: torch.device) -> Tensor:
        """(pages x size,) int64: where in a pool each of the table's positions stands."""
        if len(table.slots) != len(table.pages) * self.size:
            pages = torch.tensor(table.pages, dtype=torch.long)
            table.slots = (pages[:, None] * self.size + torch.arange(self.size)).flatten().to(device)
        return table.slots

    def register(self, table: Table, identities: Sequence[Any]) -> None:
        """Makes the table's newly full pages known, by what stands in them. Of two alike the first stays known."""
        while (table.registered + 1) * self.size <= min(table.length, len(identities)):
            start = table.registered * self.size
            table.key = self._key(table.key, identities[start : start + self.size])
            page = table.pages[table.registered]
            if table.key not in self._known and page not in self._key_of:
                self._known[table.key], self._key_of[page] = page, table.key
            table.registered += 1

    def release(self, table: Table) -> None:
        """Gives all pages back, and what recurrent layers kept."""
        for page in table.pages:
            self._uses[page] -= 1
            if not self._uses[page] and page not in self._key_of:
                self._free.append(page)
        table.pages, table.length, table.states = [], 0, None
        table.slots = table.slots[:0]

    @staticmethod
    def _key(before: bytes, identities: Sequence[Any]) -> bytes:
        return hashlib.blake2b(before + repr(list(identities)).encode(), digest_size=16).digest()


class PagedView(Cache):
    """The cache of one forward pass: `T` new positions of one request, or one new position of each of several."""

    def __init__(self, pages: Pages, tables: Sequence[Table], new: int, device: torch.device) -> None:
        super().__init__(len(pages.pools))
        if len(tables) > 1 and new > 1:
            raise ValueError("a pass reads several positions of one request, or one of each of several")
        self._pages, self._tables, self._new = pages, tables, new
        self._begins = all(table.length == 0 for table in tables)
        self.ragged = new == 1 and not self._begins
        self._lengths = [table.length + new for table in tables]
        self._rows = [pages.slots(table, device)[:length] for table, length in zip(tables, self._lengths, strict=True)]
        self._flat = torch.cat(self._rows)  # rows x S, one after the other
        self._newest = torch.cat([row[-new:] for row in self._rows])
        if not self._begins:
            # What a recurrent layer asks of the past: that there is one.
            last = torch.tensor([[table.length - 1] for table in tables], device=device)
            self.places = Places(last, torch.ones_like(last), torch.zeros_like(last))
        if tables[0].states is not None:
            rows = [table.states for table in tables if table.states is not None]
            self.layers = [
                {name: torch.cat([row[layer][name] for row in rows]) for name in rows[0][layer]}
                for layer in range(len(pages.pools))
            ]

    @cached_property
    def _padded(self) -> tuple[Tensor, Places]:
        """(R, S) slots and where they stand; rows stand at the right, so that the new positions are last."""
        size, device = max(self._lengths), self._flat.device
        slots, index, document = (torch.zeros(len(self._rows), size, dtype=torch.long, device=device) for _ in range(3))
        for row, (own, length) in enumerate(zip(self._rows, self._lengths, strict=True)):
            slots[row, size - length :] = own
            index[row, size - length :] = torch.arange(length, device=device)
            document[row, size - length :] = 1
        return slots, Places(index, document, torch.zeros_like(index))

    def extend(
        self, layer: int, layout: Layout, window: Window | None = None, shift: Shift | None = None, **new: Tensor
    ) -> tuple[Layout, Window | None, list[Tensor]]:
        pools = self._write(layer, new)
        if self._begins:
            return layout, window, list(new.values())
        slots, keys = self._padded
        seen = layout.remember("paged", lambda: Layout(layout.queries, keys, layout.positions, layout.cross))
        return seen, window, [pool[slots] for pool in pools]

    def extend_rows(self, layer: int, **new: Tensor) -> list[list[Tensor]]:
        return [list(pool[self._flat].split(self._lengths)) for pool in self._write(layer, new)]

    def _write(self, layer: int, new: dict[str, Tensor]) -> list[Tensor]:
        """Puts the new (R, T, ...) where they belong; gives the pools (slots, ...) that they are in now."""
        pool = self._pages.pools[layer]
        for name, x in new.items():
            if name not in pool:
                pool[name] = x.new_zeros(self._pages.count * self._pages.size, *x.shape[2:])
            pool[name][self._newest] = x.flatten(0, 1)
        return [pool[name] for name in new]

    def commit(self) -> None:
        """Notes that the pass is done: the new positions are written."""
        for row, table in enumerate(self._tables):
            table.length += self._new
            if any(self.layers):
                table.states = [{name: x[row : row + 1] for name, x in layer.items()} for layer in self.layers]
