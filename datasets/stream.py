"""Batches as a pure function of their number.

    batch number -> its window of samples -> encode -> pack -> PackedBatch

Batch b of a stream is made of its samples [b * S, (b + 1) * S), S = samples_per_batch over all ranks, and packing stays
inside that window. So the number of workers changes nothing, ranks split the window, and the whole state of the stream
is one number: the samples consumed. A sample that cannot be read leaves a gap, and moves no other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch.utils.data import Dataset

from mm.datasets.mixture import Mixture, subseed
from mm.datasets.packing import PackedBatch, collate, count_dropped, pack
from mm.datasets.processor import Encoded, NoTower, Processor
from mm.datasets.shard_cache import ShardError
from mm.types import Sample


class SampleSet(Protocol):
    """Samples by number, as ShardDataset gives them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def locate(self, index: int, /) -> dict[str, Any]: ...


class SampleStream(Protocol):
    """Samples by place; `locate` says where one lies: "shard", "offset", "key"."""

    def __getitem__(self, place: int, /) -> Sample: ...
    def locate(self, place: int, /) -> dict[str, Any]: ...


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

    def locate(self, place: int) -> dict[str, Any]:
        draw = self.mixture[place]
        return self.sets[draw.name].locate(draw.index)


class EvalSamples:
    """Data sets one after another, each in its own order, once."""

    def __init__(self, sets: Mapping[str, SampleSet]) -> None:
        self.sets = sets

    def __len__(self) -> int:
        return sum(len(samples) for samples in self.sets.values())

    def __getitem__(self, place: int) -> Sample:
        samples, index = self._find(place)
        return samples[index]

    def locate(self, place: int) -> dict[str, Any]:
        samples, index = self._find(place)
        return samples.locate(index)

    def _find(self, place: int) -> tuple[SampleSet, int]:
        for samples in self.sets.values():
            if place < len(samples):
                return samples, place
            place -= len(samples)
        raise IndexError(place)


@dataclass
class Batches(Dataset[PackedBatch]):
    """Map-style: the batch of a given number, for one rank.

    samples           by place
    processor         makes them ready for the model
    samples_per_batch over all ranks
    row_length        decoder positions of a row
    pack              several samples a row
    media_budget      media tokens of a row before the bridge; None: no bound
    rank, world       this rank's share of each batch
    total             length of the stream; None: endless. Where it ends, a rank may get fewer samples than another, or
                      none, but never fewer batches
    keep_bytes        whether `Batch.samples` keeps the bytes of its media
    origin            (batch, sample): the batch that begins at that sample; a run that goes on with another
                      samples_per_batch counts on from there

    Raises ValueError where `samples_per_batch` does not divide among the ranks; ShardError and NoTower pass through.
    """

    samples: SampleStream
    processor: Processor
    samples_per_batch: int
    row_length: int
    pack: bool = True
    media_budget: int | None = None
    rank: int = 0
    world: int = 1
    total: int | None = None
    keep_bytes: bool = True
    origin: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.samples_per_batch < 1 or self.samples_per_batch % self.world:
            raise ValueError(
                f"samples_per_batch={self.samples_per_batch} is over all ranks: it must be a multiple of {self.world}"
            )

    def first_sample(self, number: int) -> int:
        """The place at which batch `number` begins: the samples consumed before it."""
        batch, sample = self.origin
        return sample + (number - batch) * self.samples_per_batch

    def window(self, number: int) -> range:
        """Places in the stream of this rank's share of batch `number`: ranks' shares are contiguous and disjoint."""
        share = self.samples_per_batch // self.world
        start = self.first_sample(number) + self.rank * share
        places = range(start, start + share)
        return places if self.total is None else range(min(start, self.total), min(start + share, self.total))

    def __getitem__(self, number: int) -> PackedBatch:
        encoded, bad = self._encode(self.window(number))
        fitting = [item for item in encoded if item.fits]
        rows = pack(fitting, self.row_length, self.media_budget) if self.pack else [[item] for item in fitting]
        batch = collate(rows)
        if not self.keep_bytes:
            batch.samples = [[_without_bytes(sample) for sample in row] for row in batch.samples]
        counts = count_dropped(encoded) | ({"bad_samples": len(bad)} if bad else {})
        counts["samples"] = len(encoded) + len(bad)
        return replace(batch, number=number, keys=[item.sample.key for item in fitting], counts=counts, bad=bad)

    def _encode(self, places: range) -> tuple[list[Encoded], list[dict[str, Any]]]:
        """The samples at these places, and notes on those that cannot be used."""
        encoded: list[Encoded] = []
        bad: list[dict[str, Any]] = []
        for place in places:
            try:
                item = self.processor.encode(self.samples[place])
            except (ShardError, NoTower):
                raise
            except ValueError as error:
                bad.append({**self.samples.locate(place), "cause": " ".join(str(error).split())})
                continue
            if self.media_budget is not None and item.media_tokens > self.media_budget:
                item = replace(item, fits=False)
            encoded.append(item)
        return encoded, bad


def _without_bytes(sample: Sample) -> Sample:
    """Workers send samples to the trainer through a pipe: media that the model gets as tokens need not come twice."""
    media = [replace(m, data=b"" if isinstance(m.data, bytes) else m.data, features=None) for m in sample.media]
    return replace(sample, media=media)
