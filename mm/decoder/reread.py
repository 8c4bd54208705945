"""Decoding across a length at which rotary frequencies switch (LongRoPE): what is cached is then read again.

Past that length every position of the document turns by other frequencies, so that cached keys, and all that later
layers made of them, are those of another forward pass. The only exact cache is a new one.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mm.decoder.cache import Cache
from mm.decoder.layout import Places
from mm.types import Sequence


class Rereader:
    """Keeps the inputs of a cache's rows (width numbers a token) until every row is past the last switch.

    Without `lengths` nothing switches, and nothing is kept.
    """

    def __init__(self, lengths: Collection[int]) -> None:
        self.lengths = sorted(lengths)

    def new_cache(self, layers: int) -> Cache:
        """A cache for so many layers, and one place more for the inputs where they are needed."""
        return Cache(layers + bool(self.lengths))

    def __call__(self, sequence: Sequence, cache: Cache) -> tuple[Sequence, Tensor] | None:
        """Notes what is about to be read. If a row's document crosses a switch: empties the cache, and returns the
        whole sequence to be read into it, and in which of its columns (B, T) the given one stands; else None."""
        if not self.lengths:
            return None
        known, kept = cache.places, cache.layers[-1]
        before = sequence.index.new_zeros(len(sequence.index)) if known is None else _lengths(known)
        after = torch.maximum(before, _lengths(sequence))
        again = None
        if known is None or kept:
            inputs, positions = cache.append(-1, inputs=sequence.embeddings, positions=sequence.positions)
            if known is not None and _crosses(before, after, self.lengths):
                again = _whole(known, sequence, inputs, positions, cache)
        if bool((after > self.lengths[-1]).all()):
            cache.layers[-1].clear()
        return again


def _whole(
    known: Places, sequence: Sequence, inputs: Tensor, positions: Tensor, cache: Cache
) -> tuple[Sequence, Tensor]:
    """What was read and what is new, its padding moved to the right: documents must be unbroken in a first pass."""
    here = Places(sequence.index, sequence.document_ids, sequence.branch_ids)
    places = known.append(here)
    order = (places.document_ids == 0).long().argsort(dim=1, stable=True)

    def ordered(x: Tensor) -> Tensor:
        return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))

    inputs, positions = ordered(inputs), ordered(positions)
    places = Places(*(ordered(x) for x in (places.index, places.document_ids, places.branch_ids)))
    cache.layers = [{} for _ in cache.layers]
    cache.layers[-1] |= {"inputs": inputs, "positions": positions}
    cache.places = None
    nothing = torch.zeros_like(places.index)  # no part of the decoder reads these
    whole = Sequence(
        inputs,
        places.index,
        positions,
        places.document_ids,
        places.branch_ids,
        modality_ids=nothing,
        labels=nothing,
        predecessor=nothing,
        cross=sequence.cross,
    )
    return whole, order.argsort(1)[:, -here.index.shape[1] :]


def _lengths(places: Places | Sequence) -> Tensor:
    """(B,) the length of each row's longest document so far."""
    return ((places.index + 1) * (places.document_ids > 0)).amax(1)


def _crosses(before: Tensor, after: Tensor, lengths: list[int]) -> bool:
    """Whether a row that has begun passes one of the lengths."""
    return any(bool(((before > 0) & (before <= length) & (after > length)).any()) for length in lengths)
