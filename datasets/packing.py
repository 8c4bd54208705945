"""Encoded samples -> rows of at most so many decoder positions -> Batch.

Shape legend: `B` rows, `L` elements of the longest row, `M` media items of one kind.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm.datasets.processor import Encoded, EncodedMedia
from mm.types import IGNORE, KINDS, Batch, MediaBatch, Tokens


@dataclass
class PackedBatch(Batch):
    """A batch that knows its place in the stream and what was left out of it.

    number  place in the stream of batches
    keys    of its samples, in the order of the stream (rows are in the order of packing)
    counts  "samples" seen, "bad_samples", and what did not fit: "dropped_samples", "dropped_branches",
            "dropped_turns", "dropped_media"
    bad     the samples that could not be used: "shard", "offset", "key" and "cause" of each
    """

    number: int = 0
    keys: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)


def best_fit(
    lengths: Seq[int], capacity: int, media: Seq[int] | None = None, budget: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: the longest first, each into the fullest bin that takes it.

    With a `budget`, a bin takes no more than that of `media` either. Best-fit decreasing (Johnson 1973: at most 11/9 of
    the optimal number of bins, plus 4, without a budget). Deterministic; bins and their contents are in the order of
    arrival. Every item must fit a bin of its own.
    """
    weights = media if media is not None and budget is not None else [0] * len(lengths)
    bins: list[list[int]] = []
    left: list[int] = []  # of the budget, per bin
    room: list[tuple[int, int]] = []  # (space left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -weights[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        while place < len(room) and left[room[place][1]] < weights[index]:
            place += 1
        if place == len(room):
            space, chosen = capacity, len(bins)
            bins.append([])
            left.append(budget or 0)
        else:
            space, chosen = room.pop(place)
        bins[chosen].append(index)
        left[chosen] -= weights[index]
        insort(room, (space - lengths[index], chosen))
    return sorted(sorted(members) for members in bins)


def pack(encoded: Seq[Encoded], row_length: int, media_budget: int | None = None) -> list[list[Encoded]]:
    """As few rows of at most `row_length` decoder positions as best fit finds, and then as even as it finds them.

    `encoded` is the whole look-ahead. Even rows matter because a batch is padded to its longest: the smallest capacity
    that takes no more rows leaves the least padding. `media_budget` bounds the media tokens of a row before the bridge,
    which a resampler makes few for the decoder and not for the encoder.

    Raises ValueError, naming the sample, for one that a row cannot take.
    """
    for item in encoded:
        if item.length > row_length:
            raise ValueError(f"sample {item.sample.key} takes {item.length} positions; a row has {row_length}")
        if media_budget is not None and item.media_tokens > media_budget:
            raise ValueError(
                f"sample {item.sample.key} has {item.media_tokens} media tokens; a row takes {media_budget}"
            )
    if not encoded:
        return []
    lengths, media = [item.length for item in encoded], [item.media_tokens for item in encoded]
    rows = best_fit(lengths, row_length, media, media_budget)
    low, high = max(*lengths, -(-sum(lengths) // len(rows))), row_length
    while low < high:
        middle = (low + high) // 2
        tighter = best_fit(lengths, middle, media, media_budget)
        if len(tighter) <= len(rows):
            rows, high = tighter, middle
        else:
            low = middle + 1
    return [[encoded[i] for i in row] for row in rows]


def collate(rows: Seq[Seq[Encoded]]) -> PackedBatch:
    """The batch of these rows: padded to the longest, documents numbered from 1, media stacked per kind.

    Without any sample it is one row of one padding element, so that a rank with nothing to do still takes its step.
    """
    rows = [row for row in rows if row]
    return PackedBatch(
        input_ids=_pad([[item.ids for item in row] for row in rows], 0),
        labels=_pad([[item.labels for item in row] for row in rows], IGNORE),
        document_ids=_pad([[torch.full_like(item.ids, n) for n, item in enumerate(row, 1)] for row in rows], 0),
        branch_ids=_pad([[item.branch_ids for item in row] for row in rows], 0),
        media=_stack_media(rows),
        samples=[[item.sample for item in row] for row in rows] or [[]],
    )


def _pad(rows: list[list[Tensor]], value: int) -> Tensor:
    """(B, L) int64."""
    if not rows:
        return torch.full((1, 1), value, dtype=torch.int64)
    return pad_sequence([torch.cat(row) for row in rows], batch_first=True, padding_value=value)


def _stack_media(rows: Seq[Seq[Encoded]]) -> dict[str, MediaBatch]:
    found: defaultdict[str, list[tuple[int, int, EncodedMedia]]] = defaultdict(list)  # kind -> (row, column, item)
    for row_number, row in enumerate(rows):
        offset = 0
        for item in row:
            for media in item.media:
                found[media.kind].append((row_number, offset + media.column, media))
            offset += len(item.ids)
    return {kind: _media_batch(found[kind]) for kind in KINDS if kind in found}


def _media_batch(items: list[tuple[int, int, EncodedMedia]]) -> MediaBatch:
    return MediaBatch(
        tokens=Tokens.stack([media.tokens for _, _, media in items]),
        rows=torch.tensor([row for row, _, _ in items]),
        columns=torch.tensor([column for _, column, _ in items]),
        lengths=torch.tensor([media.length for _, _, media in items]),
        names=[media.name for _, _, media in items],
        encoded=items[0][2].encoded,  # one batch is of one data module, which reads a kind in one way
    )


def count_dropped(encoded: Seq[Encoded]) -> dict[str, int]:
    """What truncation left out of these samples, and how many samples do not fit at all."""
    counts: Counter[str] = Counter(samples=len(encoded), dropped_samples=sum(not item.fits for item in encoded))
    for item in encoded:
        if item.fits:
            counts.update({f"dropped_{what}": number for what, number in item.dropped.items()})
    return dict(+counts)
