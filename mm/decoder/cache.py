"""The cache: what each layer keeps of what it has seen, and where each cached position stands."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.decoder.layout import Places
from mm.types import CrossMedia


class Cache:
    """Grows with each forward pass. Rows may be ragged: padding is cached too, as document 0, and never seen.

    `layers[i]` are layer i's tensors by name, rows first: what grows along dim 1 by `extend` (keys and values, or MLA's
    latents) and what is replaced in whole (the state of an SSM). `places` (B, S) says where the cached positions stand;
    `next_index` (B,) and `next_position` (B,) are the index and the multi-axis position of the token that comes next
    in each row; `cross` is the media beside the sequence.
    """

    def __init__(self, layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self.places: Places | None = None
        self.next_index: Tensor | None = None
        self.next_position: Tensor | None = None
        self.cross: CrossMedia | None = None

    def __len__(self) -> int:
        """Cached positions a row, padding included."""
        return 0 if self.places is None else self.places.index.shape[1]

    def extend(self, layer: int, **new: Tensor) -> list[Tensor]:
        """Appends (B, T, ...) tensors to a layer, by name, and returns each with all that the layer has of it."""
        kept = self.layers[layer]
        kept |= {name: torch.cat([kept[name], x], 1) if name in kept else x for name, x in new.items()}
        return [kept[name] for name in new]

    def keep(self, rows: Tensor) -> None:
        """Drops every row but `rows` (int64 or bool), in that order."""
        self.layers = [{name: x[rows] for name, x in layer.items()} for layer in self.layers]
        if self.places is not None:
            p = self.places
            self.places = Places(p.index[rows], p.document_ids[rows], p.branch_ids[rows])
        if self.next_index is not None and self.next_position is not None:
            self.next_index, self.next_position = self.next_index[rows], self.next_position[rows]
        if self.cross is not None:
            c = self.cross
            self.cross = CrossMedia(c.values[rows], c.document_ids[rows], c.branch_ids[rows], c.index[rows])

    def bytes(self) -> int:
        """Memory that the layers' tensors take."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())
