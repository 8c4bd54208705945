"""Lightning's side of the stream: which batch comes next, in which processes it is made, and how a run is resumed.

The state is the number of samples consumed: the batches trained on, which the trainer itself counts when a step has
ended, times their size (`mm.datasets.stream` does the rest). Loaders keep no state: Lightning would restart them at the
first sample, and a loader that counts what it hands out is not where training is.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from mm.datasets.chat_template import ChatTemplate, Vocabulary
from mm.datasets.features import Encoders, Stored, stored_features
from mm.datasets.fingerprint import describe, differing, flatten
from mm.datasets.loading import BatchLoader, TrainLoader
from mm.datasets.mixture import Mixture, subseed
from mm.datasets.packing import PackedBatch
from mm.datasets.processor import Processor
from mm.datasets.quarantine import QUARANTINE, Quarantine
from mm.datasets.shard_cache import ShardCache
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.stream import Batches, EvalSamples, SampleStream, TrainSamples
from mm.types import MediaSpec


@dataclass
class DataSet:
    """A directory of shards (a folder, or a URL that fsspec opens) and its part in the mixture.

    weight  share of the samples, relative to the other sets' (None: its number of samples)
    epochs  instead: how often it is read while the mixture is read once (see `Mixture`)
    """

    path: str
    weight: float | None = None
    epochs: float | None = None


class Reader(Encoders, Protocol):
    """What the data side needs to know of a model; of its encoders, only where shards hold features."""

    @property
    def tokenizer(self) -> Vocabulary: ...
    @property
    def template(self) -> ChatTemplate: ...
    def media_specs(self) -> Mapping[str, MediaSpec]: ...


def _digest(samples: ShardDataset) -> str:
    """The identity of a directory of shards, wherever it lies."""
    return f"{subseed(*(shard['sha256'] for shard in samples.manifest['shards'])):016x}"


@dataclass
class Reading:
    """How shards are read: nothing here changes what is trained on.

    prefetch  batches that each worker holds ready
    max_bad   share of the samples read (of 1000 at least) that may be unreadable; past it the run ends. They are passed
              over, counted and written to `quarantine.jsonl` in the run's folder. Validation tolerates none
    cache     local copies of shards behind a URL
    keep_mib  MiB of media tokens that each worker keeps in memory: what a later epoch brings again is not decoded again
    """

    prefetch: int = 2
    max_bad: float = 0.01
    cache: ShardCache = field(default_factory=ShardCache)
    keep_mib: int = 0

    def __post_init__(self) -> None:
        if self.keep_mib < 0:
            raise ValueError(f"data.reading.keep_mib must be 0 or more MiB, not {self.keep_mib}")


class StreamingDataModule(LightningDataModule):
    """Weighted mixture of shard directories -> packed batches, exactly resumable in the middle of an epoch.

    The same settings give the same batches whatever the number of workers; ranks split each batch. An epoch is
    ceil(epoch_samples / samples_per_batch) batches on every rank, known from the manifests, and the stream runs on
    across epochs, so that every batch is full. Text tokenizer, chat template and media specs come from
    `trainer.lightning_module.model`, or from `attach(model)`.

    `allow_change` (an attribute: for one resume, so no config can carry it) names settings that may differ from those
    of the checkpoint that is resumed; `mm fit --allow-change KEY` fills it.

    Args:
        train: name -> shards and weight.
        val: name -> shards; read in order, each sample once, all branches.
        samples_per_batch: samples of one batch over all ranks; rows follow from packing.
        row_length: decoder positions of a row after the splice. Longer samples are cut by whole turns and media; those
            that still do not fit are dropped, counted in `counts` and warned about.
        pack: several samples a row; False: one.
        media_budget: media tokens of a row before the bridge, as many as an encoder reads (None: no bound).
        max_branches: at most this many branches of a training sample, a seeded random subset (None: all).
        one_set_per_batch: a batch's samples come from one set, and the sets take turns by weight: what contrastive
            losses want, since items of different sets are told apart too easily to learn from.
        temperature: evens out the weights (see `Mixture`).
        workers: loader processes; 0 loads in the training process.
        seed: of the order, the mixture and the branches.
        epoch_samples: samples of an epoch (None: as many as the training sets hold, each as often as its epochs say).
        reading: what changes nothing of the stream: prefetching, quarantine, cache.
        features: where shards hold the features of an encoder (`mm shard --features`), read those; False: the media.
    """

    def __init__(
        self,
        train: dict[str, DataSet] | None = None,
        val: dict[str, DataSet] | None = None,
        samples_per_batch: int = 32,
        row_length: int = 1024,
        pack: bool = True,
        media_budget: int | None = None,
        max_branches: int | None = None,
        one_set_per_batch: bool = False,
        temperature: float = 1.0,
        workers: int = 0,
        seed: int = 0,
        epoch_samples: int | None = None,
        reading: Reading | None = None,
        features: bool = True,
    ) -> None:
        super().__init__()
        self.train, self.val = train or {}, val or {}
        self.samples_per_batch, self.row_length = samples_per_batch, row_length
        self.pack, self.media_budget, self.max_branches = pack, media_budget, max_branches
        self.one_set_per_batch, self.temperature = one_set_per_batch, temperature
        self.workers = workers
        self.seed, self.epoch_samples = seed, epoch_samples
        self.reading, self.features = reading or Reading(), features
        self.allow_change: Sequence[str] = ()
        self.counts: Counter[str] = Counter()
        self._sets: dict[str, ShardDataset] = {}
        self._reader: Reader | None = None
        self._loader: weakref.ref[TrainLoader] | None = None
        self._resumed: dict[str, Any] | None = None
        self._origin = (0, 0)  # batch and sample at which this run, or the one that it resumes, set out
        self._quarantine = Quarantine(None, self.reading.max_bad)

    def attach(self, model: Reader) -> None:
        """Makes batches for `model`; under a trainer its module's `model` is taken without asking."""
        self._reader = model

    def train_dataloader(self) -> TrainLoader:
        self._check_resume()
        mixture = self._mixture()
        samples = TrainSamples(self._open_all(self.train), mixture, self.max_branches)
        batches = self._batches(samples, self.train, total=None, keep_bytes=False)
        length = -(-(self.epoch_samples or len(mixture)) // self.samples_per_batch)
        self._quarantine = Quarantine(self._run_file(QUARANTINE), self.reading.max_bad)
        options = {"workers": self.workers, "prefetch": self.reading.prefetch, "note": self._note}
        loader = TrainLoader(batches, length, position=self.position, **options)
        self._loader = weakref.ref(loader)  # weakly, as it refers to this module
        return loader

    def val_dataloader(self) -> BatchLoader | list[Any]:
        if not self.val:
            return []
        samples = EvalSamples(self._open_all(self.val))
        batches = self._batches(samples, self.val, total=len(samples), keep_bytes=True)
        strict = Quarantine(None, max_bad=0)  # a score over fewer samples would be another score

        def note(batch: PackedBatch) -> None:
            strict.add(batch.counts["samples"], batch.bad)

        length = -(-len(samples) // self.samples_per_batch)
        return BatchLoader(batches, length, self.workers, self.reading.prefetch, note)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self._end_workers()

    def on_exception(self, exception: BaseException) -> None:
        self._end_workers()

    def position(self) -> tuple[int, int]:
        """Batches whose step has ended: in the whole run, and in the epoch that is under way."""
        if self.trainer is None:
            return 0, 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.processed, progress.current.processed

    def count(self, counts: Mapping[str, int]) -> None:
        """Adds to `counts`; warns at the first, tenth, hundredth, ... sample that is dropped or bad."""
        for what, why in (
            ("dropped_samples", f"dropped: they take more than row_length={self.row_length} positions, or media_budget="
             f"{self.media_budget} media tokens, even without the turns and media that may go"),
            ("bad_samples", f"passed over: they cannot be read; {QUARANTINE} says why"),
        ):  # fmt: skip
            before, after = self.counts[what], self.counts[what] + counts.get(what, 0)
            if len(str(after)) > len(str(before)) or (after and not before):
                total = self.counts["samples"] + counts["samples"]
                rank_zero_warn(f"{after} of {total} samples so far are {why}")
        self.counts.update(counts)

    def state_dict(self) -> dict[str, Any]:
        batches = self.position()[0]
        origin, start = self._origin
        return {
            "batches": batches,
            "samples": start + (batches - origin) * self.samples_per_batch,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Only a resumed fit reads the stream on; validating a checkpoint loads it too, with whatever data.
        self._resumed = state_dict

    def changes(self, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings that are not those of a checkpoint's state, but for `allow_change`: "data.KEY" -> (then, now)."""
        then, now = flatten(state["settings"], "data"), flatten(self._settings(), "data")
        return differing(then, now, self.allow_change)

    def _end_workers(self) -> None:
        loader = self._loader and self._loader()
        if loader is not None:
            loader.close()

    def _check_resume(self) -> None:
        if self._resumed is None:
            return
        changed = self.changes(self._resumed)
        if changed:
            raise ValueError(f"the checkpoint was made with other data: {describe(changed)}")
        self._origin = self._resumed["batches"], self._resumed["samples"]
        if self.one_set_per_batch:  # with another batch size than before, on to where a block of one set begins
            self._origin = self._origin[0], -(-self._origin[1] // self.samples_per_batch) * self.samples_per_batch
        self._resumed = None

    def _settings(self) -> dict[str, Any]:
        """What the batches of a given number depend on."""
        weights = self._mixture().weights if self.train else {}
        sets = self._open_all(self.train)
        return {
            "train": {name: {"shards": _digest(of), "weight": str(weights[name])} for name, of in sets.items()},
            "samples_per_batch": self.samples_per_batch,
            "row_length": self.row_length,
            "pack": self.pack,
            "media_budget": self.media_budget,
            "max_branches": self.max_branches,
            "one_set_per_batch": self.one_set_per_batch,
            "seed": self.seed,
            "epoch_samples": self.epoch_samples,
            **({"features": self.features} if any("features" in of.manifest for of in sets.values()) else {}),
        }

    def _note(self, batch: PackedBatch) -> None:
        self._quarantine.add(batch.counts["samples"], batch.bad)
        self.count(batch.counts)

    def _run_file(self, name: str) -> Path | None:
        folder = self.trainer.log_dir if self.trainer else None  # a collective: asked on every rank
        return Path(folder) / name if folder else None

    def _mixture(self) -> Mixture:
        if not self.train:
            raise ValueError("data.train is empty: name at least one directory of shards")
        sets = self._open_all(self.train)
        return Mixture(
            {name: len(samples) for name, samples in sets.items()},
            {name: data.weight for name, data in self.train.items()},
            self.seed,
            self.samples_per_batch if self.one_set_per_batch else 1,
            epochs={name: data.epochs for name, data in self.train.items()},
            temperature=self.temperature,
            read_blocks={name: samples.block() for name, samples in sets.items()},
        )

    def _open_all(self, sets: dict[str, DataSet]) -> dict[str, ShardDataset]:
        for data in sets.values():
            if data.path not in self._sets:
                self._sets[data.path] = ShardDataset(data.path, self.reading.cache)
        return {name: self._sets[data.path] for name, data in sets.items()}

    def _batches(self, samples: SampleStream, sets: dict[str, DataSet], total: int | None, keep_bytes: bool) -> Batches:
        reader: Reader = self._reader or self.trainer.lightning_module.model  # type: ignore[union-attr, assignment]
        features: dict[str, Stored] = stored_features(self._open_all(sets), reader) if self.features else {}
        keep = self.reading.keep_mib << 20 if total is None else 0  # validation reads each sample once
        return Batches(
            samples,
            Processor(reader.tokenizer, reader.template, reader.media_specs(), self.row_length, features, keep),
            self.samples_per_batch,
            self.row_length,
            self.pack,
            self.media_budget,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
            total=total,
            keep_bytes=keep_bytes,
            origin=self._origin if total is None else (0, 0),
        )
