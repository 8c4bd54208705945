"""The key/value cache: what a layer has seen, and where each cached key stands."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.decoder.layout import Places
from mm.types import CrossMedia


class Cache:
    """Grows with each forward pass. Rows may be ragged: padding is cached too, as document 0, and never seen.

    `places` (B, S) says where the cached keys stand; `next_index` (B,) and `next_position` (B,) are the index and the
    multi-axis position of the token that comes next in each row; `cross` is the media beside the sequence.
    """

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.places: Places | None = None
        self.next_index: Tensor | None = None
        self.next_position: Tensor | None = None
        self.cross: CrossMedia | None = None

    def __len__(self) -> int:
        """Cached positions a row, padding included."""
        return 0 if self.places is None else self.places.index.shape[1]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, T, H, d) keys and values to a layer and returns all of that layer's."""
        old_keys, old_values = self.keys[layer], self.values[layer]
        if old_keys is not None and old_values is not None:
            keys, values = torch.cat([old_keys, keys], 1), torch.cat([old_values, values], 1)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Drops every row but `rows` (int64 or bool), in that order."""
        self.keys = [None if k is None else k[rows] for k in self.keys]
        self.values = [None if v is None else v[rows] for v in self.values]
        if self.places is not None:
            p = self.places
            self.places = Places(p.index[rows], p.document_ids[rows], p.branch_ids[rows])
        if self.next_index is not None and self.next_position is not None:
            self.next_index, self.next_position = self.next_index[rows], self.next_position[rows]
        if self.cross is not None:
            c = self.cross
            self.cross = CrossMedia(c.values[rows], c.document_ids[rows], c.branch_ids[rows], c.index[rows])

    def bytes(self) -> int:
        """Memory that the cached keys and values take."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values) if x is not None)
