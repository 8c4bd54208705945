"""The cache: what each layer keeps of what it has seen, and where each cached position stands."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mm.decoder.attention.windows import Window
from mm.decoder.layout import Layout, Places
from mm.types import CrossMedia, Sequence

SPARE = 64  # positions that a growing tensor is given beyond what it needs, at least

Shift = Callable[[Tensor, Tensor], Tensor]  # keys (B, S, ...) and places to move each row on by, (B,) -> such keys


class Cache:
    """Grows with each forward pass. Rows may be ragged: padding is cached too, as document 0, and never seen.

    `layers[i]` are layer i's tensors by name, rows first: what grows along dim 1 by `extend` (keys and values, or MLA's
    latents) and what is replaced in whole (the state of an SSM). `places` (B, S) says where the cached positions stand;
    `next_index` (B,) and `next_position` (B,) are the index and the multi-axis position of the token that comes next
    in each row; `cross` is the media beside the sequence.

    This one keeps everything. Others, in mm.generation.caches, keep less by overriding `extend`.
    """

    ragged = False  # whether `extend_rows` is to be asked for

    def __init__(self, layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self.room: list[dict[str, Tensor]] = [{} for _ in range(layers)]  # longer tensors, which those of layers begin
        self.places: Places | None = None
        self.next_index: Tensor | None = None
        self.next_position: Tensor | None = None
        self.cross: CrossMedia | None = None

    def __len__(self) -> int:
        """Cached positions a row, padding included."""
        return 0 if self.places is None else self.places.index.shape[1]

    def begin(self, sequence: Sequence) -> Layout:
        """The layout of a forward pass that goes on from here."""
        return Layout.of(sequence, self.places)

    def end(self, layout: Layout) -> None:
        """The pass with that layout is done."""
        self.places = layout.keys

    def step(self, function: Callable[[Tensor, Cache], Tensor], ids: Tensor) -> Tensor:
        """`function(ids, self)`, one more token (B,) in each row -> (B, V). Here as it is."""
        return function(ids, self)

    def extend(
        self, layer: int, layout: Layout, window: Window | None = None, shift: Shift | None = None, **new: Tensor
    ) -> tuple[Layout, Window | None, list[Tensor]]:
        """Attention's way in: `new` are (B, T, ...) tensors by name, the first of them keys, at the layout's queries.

        Gives, by the same names, all that the layer keeps, with the layout and the window that go with it. `window` is
        the mixer's own. `shift` turns cached keys on by places; None says that keys know nothing of their places.
        """
        return layout, window, self.append(layer, **new)

    def extend_rows(self, layer: int, **new: Tensor) -> list[list[Tensor]]:
        """As `extend`, for one new position of each row (B, 1, ...) that sees all that its row has: of each tensor a
        list of what each row has, (S_row, ...), without padding. Only where `ragged` says so."""
        raise TypeError(f"{type(self).__name__} keeps its rows side by side; ask extend")

    def attended(self, layer: int, q: Tensor, layout: Layout, window: Window | None, scale: float) -> None:
        """Attention's word, after `extend`, of which queries (B, T, H, d) it asked. Here nobody listens."""

    def append(self, layer: int, **new: Tensor) -> list[Tensor]:
        """Appends (B, T, ...) tensors to a layer, by name, and returns each with all that the layer has of it."""
        return [self._append(layer, name, x) for name, x in new.items()]

    def _append(self, layer: int, name: str, x: Tensor) -> Tensor:
        kept = self.layers[layer].get(name)
        if kept is None:
            self.layers[layer][name] = x
            return x
        used, length = kept.shape[1], kept.shape[1] + x.shape[1]
        room = self.room[layer].get(name)
        if room is None or room.data_ptr() != kept.data_ptr() or room.shape[1] < length or len(room) != len(kept):
            # Half as much again each time, so that what is copied on the way stays a small multiple of what is kept.
            room = kept.new_empty(len(kept), max(length + SPARE, used * 3 // 2), *kept.shape[2:])
            room[:, :used] = kept
            self.room[layer][name] = room
        room[:, used:length] = x
        self.layers[layer][name] = room[:, :length]
        return self.layers[layer][name]

    def keep(self, rows: Tensor) -> None:
        """Drops every row but `rows` (int64 or bool), in that order; one may be named twice."""
        self.layers = [{name: x[rows] for name, x in layer.items()} for layer in self.layers]
        self.room = [{} for _ in self.layers]
        if self.places is not None:
            self.places = self.places.keep(rows)
        if self.next_index is not None and self.next_position is not None:
            self.next_index, self.next_position = self.next_index[rows], self.next_position[rows]
        if self.cross is not None:
            c = self.cross
            self.cross = CrossMedia(c.values[rows], c.document_ids[rows], c.branch_ids[rows], c.index[rows])

    def drop_last(self, count: int) -> None:
        """Forgets the newest `count` positions of every row, which must be real ones; recurrent states cannot."""
        if not count:
            return
        self.layers = [{name: x[:, :-count] for name, x in layer.items()} for layer in self.layers]
        if self.places is not None:
            p = self.places
            self.places = Places(p.index[:, :-count], p.document_ids[:, :-count], p.branch_ids[:, :-count])
        if self.next_index is not None and self.next_position is not None:
            self.next_index, self.next_position = self.next_index - count, self.next_position - count

    def bytes(self) -> int:
        """Memory that the layers' tensors take."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())
