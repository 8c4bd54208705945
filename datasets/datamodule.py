"""Lightning's side of the stream: which batch comes next, in which processes it is made, and how a run is resumed.

The state is the number of batches trained on, which the trainer itself counts when a step has ended
(`mm.datasets.stream` does the rest). Loaders keep no state: Lightning would restart them at the first sample, and a
loader that counts what it hands out is not where training is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from mm.datasets.chat_template import ChatTemplate, Vocabulary
from mm.datasets.mixture import Mixture, subseed
from mm.datasets.packing import PackedBatch
from mm.datasets.processor import Processor
from mm.datasets.shards import ShardDataset
from mm.datasets.stream import Batches, EvalSamples, SampleStream, TrainSamples
from mm.types import MediaSpec


@dataclass
class DataSet:
    """A directory of shards and its weight in the mixture (None: its number of samples)."""

    path: str
    weight: float | None = None


class Reader(Protocol):
    """What the data side needs to know of a model."""

    @property
    def tokenizer(self) -> Vocabulary: ...
    @property
    def template(self) -> ChatTemplate: ...
    def media_specs(self) -> Mapping[str, MediaSpec]: ...


def _digest(samples: ShardDataset) -> str:
    """The identity of a directory of shards, wherever it lies."""
    return f"{subseed(*(shard['sha256'] for shard in samples.manifest['shards'])):016x}"


class _Loader:
    """Iterates batches by number. Not a DataLoader, so that Lightning does not put a sampler of its own into it."""

    def __init__(self, module: StreamingDataModule, batches: Batches, length: int) -> None:
        self.module, self.batches, self.length = module, batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PackedBatch]:
        yield from self._open(range(self.length))

    def _open(self, numbers: range) -> Iterator[PackedBatch]:
        workers = self.module.workers
        # A generator of its own: a loader draws its workers' seed when it is opened, and a resumed run opens it at
        # other moments than an unbroken one; the global generator would not be where it was.
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                prefetch_factor=self.module.prefetch if workers else None,
                generator=torch.Generator(),
            )
        )


class _TrainLoader(_Loader):
    """One epoch of the endless stream, from where the trainer stands.

    A generator: Lightning calls iter() before it has put its counters in order after a resume, but next() after. The
    first next() therefore asks the trainer. The workers run on from one epoch to the next.
    """

    def __init__(self, module: StreamingDataModule, batches: Batches, length: int) -> None:
        super().__init__(module, batches, length)
        self._stream: Iterator[PackedBatch] = iter(())
        self._next: int | None = None  # number of the batch that `_stream` gives next

    def __iter__(self) -> Iterator[PackedBatch]:
        done, done_in_epoch = self.module.position()
        if self._next != done:
            self._stream = self._open(range(done, 2**62))
        for number in range(done, done + self.length - done_in_epoch):
            batch = next(self._stream)
            self._next = number + 1
            self.module.count(batch.counts)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """With it Lightning knows that the loader resumes exactly, and does not warn that it cannot."""
        return {"batches": self.module.position()[0]}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to do: the trainer's counters are restored, and `position` reads those."""


class StreamingDataModule(LightningDataModule):
    """Weighted mixture of shard directories -> packed batches, exactly resumable in the middle of an epoch.

    The same settings give the same batches whatever the number of workers; ranks split each batch. An epoch is
    ceil(epoch_samples / samples_per_batch) batches, and the stream runs on across epochs, so that every batch is full.
    Text tokenizer, chat template and media specs come from `trainer.lightning_module.model`, or from `attach(model)`.

    Args:
        train: name -> shards and weight.
        val: name -> shards; read in order, each sample once, all branches.
        samples_per_batch: samples of one batch over all ranks; rows follow from packing.
        row_length: decoder positions of a row after the splice. Longer samples are cut by whole turns and media; those
            that still do not fit are dropped, counted in `counts` and warned about.
        pack: several samples a row; False: one.
        max_branches: at most this many branches of a training sample, a seeded random subset (None: all).
        one_set_per_batch: a batch's samples come from one set, and the sets take turns by weight: what contrastive
            losses want, since items of different sets are told apart too easily to learn from.
        workers: loader processes; 0 loads in the training process.
        prefetch: batches that each worker holds ready.
        seed: of the order, the mixture and the branches.
        epoch_samples: samples of an epoch (None: as many as the training sets hold).
        allow_change: settings that may differ from those of the checkpoint that is resumed.
    """

    def __init__(
        self,
        train: dict[str, DataSet] | None = None,
        val: dict[str, DataSet] | None = None,
        samples_per_batch: int = 32,
        row_length: int = 1024,
        pack: bool = True,
        max_branches: int | None = None,
        one_set_per_batch: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        seed: int = 0,
        epoch_samples: int | None = None,
        allow_change: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val = train or {}, val or {}
        self.samples_per_batch, self.row_length, self.pack = samples_per_batch, row_length, pack
        self.max_branches = max_branches
        self.one_set_per_batch = one_set_per_batch
        self.workers, self.prefetch = workers, prefetch
        self.seed, self.epoch_samples = seed, epoch_samples
        self.allow_change = allow_change or []
        self.counts: Counter[str] = Counter()
        self._sets: dict[str, ShardDataset] = {}
        self._reader: Reader | None = None
        self._resumed: dict[str, Any] | None = None

    def attach(self, model: Reader) -> None:
        """Makes batches for `model`; under a trainer its module's `model` is taken without asking."""
        self._reader = model

    def train_dataloader(self) -> _TrainLoader:
        self._check_resume()
        mixture = self._mixture()
        samples = TrainSamples(self._open_all(self.train), mixture, self.max_branches)
        batches = self._batches(samples, total=None, keep_bytes=False)
        return _TrainLoader(self, batches, -(-(self.epoch_samples or len(mixture)) // self.samples_per_batch))

    def val_dataloader(self) -> _Loader | list[Any]:
        if not self.val:
            return []
        samples = EvalSamples(self._open_all(self.val))
        batches = self._batches(samples, total=len(samples), keep_bytes=True)
        return _Loader(self, batches, -(-len(samples) // self.samples_per_batch))

    def position(self) -> tuple[int, int]:
        """Batches whose step has ended: in the whole run, and in the epoch that is under way."""
        if self.trainer is None:
            return 0, 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.processed, progress.current.processed

    def count(self, counts: Mapping[str, int]) -> None:
        """Adds to `counts`; warns at the first, tenth, hundredth, ... dropped sample."""
        before = self.counts["dropped_samples"]
        self.counts.update(counts)
        after = self.counts["dropped_samples"]
        if len(str(after)) > len(str(before)) or (after and not before):
            rank_zero_warn(
                f"{after} of {self.counts['samples']} samples so far are dropped: they take more than "
                f"row_length={self.row_length} positions even without the turns and media that may go"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.position()[0], "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Only a resumed fit reads the stream on; validating a checkpoint loads it too, with whatever data.
        self._resumed = state_dict

    def _check_resume(self) -> None:
        if self._resumed is None:
            return
        then, now = self._resumed["settings"], self._settings()
        changed = [key for key in now if then.get(key) != now[key] and key not in self.allow_change]
        if changed:
            differences = "; ".join(f"{key}: {then.get(key)} -> {now[key]}" for key in changed)
            raise ValueError(
                f"the checkpoint was made with other data settings ({differences}), so its place in the stream means "
                "nothing here; restore them, or name them in allow_change"
            )
        self._resumed = None

    def _settings(self) -> dict[str, Any]:
        """What the batches of a given number depend on."""
        weights = self._mixture().weights if self.train else {}
        sets = self._open_all(self.train)
        return {
            "train": {name: [_digest(samples), str(weights[name])] for name, samples in sets.items()},
            "samples_per_batch": self.samples_per_batch,
            "row_length": self.row_length,
            "pack": self.pack,
            "max_branches": self.max_branches,
            "one_set_per_batch": self.one_set_per_batch,
            "seed": self.seed,
            "epoch_samples": self.epoch_samples,
        }

    def _mixture(self) -> Mixture:
        if not self.train:
            raise ValueError("data.train is empty: name at least one directory of shards")
        sizes = {name: len(samples) for name, samples in self._open_all(self.train).items()}
        weights = {name: data.weight for name, data in self.train.items()}
        return Mixture(sizes, weights, self.seed, self.samples_per_batch if self.one_set_per_batch else 1)

    def _open_all(self, sets: dict[str, DataSet]) -> dict[str, ShardDataset]:
        for data in sets.values():
            if data.path not in self._sets:
                self._sets[data.path] = ShardDataset(Path(data.path))
        return {name: self._sets[data.path] for name, data in sets.items()}

    def _batches(self, samples: SampleStream, total: int | None, keep_bytes: bool) -> Batches:
        reader: Reader = self._reader or self.trainer.lightning_module.model  # type: ignore[union-attr, assignment]
        return Batches(
            samples,
            Processor(reader.tokenizer, reader.template, reader.media_specs(), self.row_length),
            self.samples_per_batch,
            self.row_length,
            self.pack,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
            total=total,
            keep_bytes=keep_bytes,
        )
