"""Batches as a pure function of their number.

    batch number -> its window of samples -> encode -> pack -> PackedBatch

Batch b of a stream is made of its samples [b * S, (b + 1) * S), S = samples_per_batch over all ranks, and packing stays
inside that window. So the number of workers changes nothing, ranks split the window, and the whole state of the stream
is one number: the batches done.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch.utils.data import Dataset

from mm.datasets.mixture import Mixture, subseed
from mm.datasets.packing import PackedBatch, collate, count_dropped, pack
from mm.datasets.processor import Processor
from mm.types import Sample


class SampleSet(Protocol):
    """Samples by number, as ShardDataset gives them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


class SampleStream(Protocol):
    """Samples by place."""

    def __getitem__(self, place: int, /) -> Sample: ...


class TrainSamples:
    """The shuffled, weighted, endless stream of samples."""

    def __init__(self, sets: Mapping[str, SampleSet], mixture: Mixture, max_branches: int | None = None) -> None:
        self.sets, self.mixture, self.max_branches = sets, mixture, max_branches

    def __getitem__(self, place: int) -> Sample:
        draw = self.mixture[place]
        sample = self.sets[draw.name][draw.index]
        if self.max_branches is None or len(sample.branches) <= self.max_branches:
            return sample
        # A random subset of the branches, in their order, drawn anew in each epoch of the data set.
        generator = random.Random(subseed(self.mixture.seed, draw.name, draw.epoch, draw.index))
        chosen = sorted(generator.sample(range(len(sample.branches)), self.max_branches))
        return replace(sample, branches=[sample.branches[i] for i in chosen])


class EvalSamples:
    """Data sets one after another, each in its own order, once."""

    def __init__(self, sets: Mapping[str, SampleSet]) -> None:
        self.sets = sets

    def __len__(self) -> int:
        return sum(len(samples) for samples in self.sets.values())

    def __getitem__(self, place: int) -> Sample:
        for samples in self.sets.values():
            if place < len(samples):
                return samples[place]
            place -= len(samples)
        raise IndexError(place)


@dataclass
class Batches(Dataset[PackedBatch]):
    """Map-style: the batch of a given number, for one rank.

    `total` is the length of the stream, None for an endless one. Where it ends, a rank may get fewer samples than
    another, or none, but never fewer batches. `keep_bytes=False` leaves out the bytes of the media in `Batch.samples`.

    Raises ValueError where `samples_per_batch` does not divide among the ranks.
    """

    samples: SampleStream
    processor: Processor
    samples_per_batch: int
    row_length: int
    pack: bool = True
    rank: int = 0
    world: int = 1
    total: int | None = None
    keep_bytes: bool = True

    def __post_init__(self) -> None:
        if self.samples_per_batch < 1 or self.samples_per_batch % self.world:
            raise ValueError(
                f"samples_per_batch={self.samples_per_batch} is over all ranks: it must be a multiple of {self.world}"
            )

    def window(self, number: int) -> range:
        """Places in the stream of this rank's share of batch `number`: ranks' shares are contiguous and disjoint."""
        share = self.samples_per_batch // self.world
        start = number * self.samples_per_batch + self.rank * share
        places = range(start, start + share)
        return places if self.total is None else range(min(start, self.total), min(start + share, self.total))

    def __getitem__(self, number: int) -> PackedBatch:
        encoded = [self.processor.encode(self.samples[place]) for place in self.window(number)]
        fitting = [item for item in encoded if item.fits]
        batch = collate(pack(fitting, self.row_length) if self.pack else [[item] for item in fitting])
        if not self.keep_bytes:
            batch.samples = [[_without_bytes(sample) for sample in row] for row in batch.samples]
        return replace(batch, number=number, counts=count_dropped(encoded))


def _without_bytes(sample: Sample) -> Sample:
    """Workers send samples to the trainer through a pipe: media that the model gets as tokens need not come twice."""
    return replace(sample, media=[replace(m, data=b"") if isinstance(m.data, bytes) else m for m in sample.media])
