"""Loaders under Lightning: batches by number, made in worker processes, from where the trainer stands."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mm.datasets.packing import PackedBatch
from mm.datasets.parcel import Parcel
from mm.datasets.stream import Batches

LOG = logging.getLogger(__name__)
Note = Callable[[PackedBatch], None]
_T = TypeVar("_T")
# Seconds that training waits for a batch before its workers, begun anew, run like any other process: they are slow, or
# other programs leave them no core.
PATIENCE = 2.0
AT_ONCE = 8  # batches of a worker: what a run begins with


class BatchLoader:
    """Iterates batches by number, once. Not a DataLoader, so that Lightning does not put a sampler of its own into it.

    `note` sees every batch before the trainer does.
    """

    def __init__(self, batches: Batches, length: int, workers: int, prefetch: int, note: Note) -> None:
        self.batches, self.length = batches, length
        self.workers, self.prefetch, self.note = workers, prefetch, note

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in self._open(range(self.length)):
            self.note(batch)
            yield batch

    def _open(self, numbers: range) -> Generator[PackedBatch, None, None]:
        return _read(self.batches, numbers, self.workers, self.prefetch)


class TrainLoader(BatchLoader):
    """One epoch of the endless stream, from where the trainer stands.

    A generator: Lightning calls iter() before it has put its counters in order after a resume, but next() after. The
    first next() therefore asks the trainer. The workers run on from one epoch to the next.

    `position` gives the batches whose step has ended: in the whole run, and in the epoch that is under way.
    """

    def __init__(self, *arguments: Any, position: Callable[[], tuple[int, int]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.position = position
        self._stream = self._open(range(0))
        self._next: int | None = None  # number of the batch that `_stream` gives next

    def __iter__(self) -> Iterator[PackedBatch]:
        done, done_in_epoch = self.position()
        if self._next != done:
            self._stream.close()
            self._stream = self._open(range(done, 2**62))
        for number in range(done, done + self.length - done_in_epoch):
            batch = next(self._stream)
            self._next = number + 1
            self.note(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """With it Lightning knows that the loader resumes exactly, and does not warn that it cannot."""
        return {"batches": self.position()[0]}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to do: the trainer's counters are restored, and `position` reads those."""

    def close(self) -> None:
        """Ends the workers."""
        self._stream.close()
        self._next = None


def _read(batches: Batches, numbers: range, workers: int, prefetch: int) -> Generator[PackedBatch, None, None]:
    """On a machine that computes on its CPU alone, workers give way to training until it waits for them."""
    gives_way = workers > 0 and hasattr(os, "SCHED_IDLE") and not torch.accelerator.is_available()
    try:
        while numbers:
            for batch, waited in _timed(_open_loader(batches, numbers, workers, prefetch, gives_way)):
                yield batch.open() if isinstance(batch, Parcel) else batch
                numbers = numbers[1:]
                if gives_way and waited > PATIENCE:
                    LOG.info("a batch came after %.1f s: loader workers begin anew and give way no more", waited)
                    gives_way = False
                    break
    except ValueError as error:
        if not str(error).startswith("Caught "):
            raise
        # From a worker: PyTorch makes the whole traceback a part of the message.
        raise type(error)(str(error).strip().splitlines()[-1].split(": ", 1)[-1]) from error


def _open_loader(
    batches: Batches, numbers: range, workers: int, prefetch: int, gives_way: bool
) -> Iterator[PackedBatch | Parcel]:
    # Refers to no loader, so that no cycle keeps it: PyTorch's iterator ends its workers at once when its last
    # reference goes, but waits five seconds for each of them when the garbage collector finds it.
    return iter(
        DataLoader(
            _InWorker(batches, gives_way) if workers else batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            # Of its own: a loader draws its workers' seed when it is opened, and a resumed run opens it at other
            # moments than an unbroken one; the global generator would not be where it was.
            generator=torch.Generator(),
        )
    )


def _timed(batches: Iterator[_T]) -> Generator[tuple[_T, float], None, None]:
    """Each with the seconds that it was waited for; the first, for which workers have to start, with none."""
    started = math.inf
    for batch in batches:
        yield batch, time.perf_counter() - started
        started = time.perf_counter()


class _InWorker(Dataset[Parcel]):
    """The same batches as parcels; with `gives_way`, from a worker that after `AT_ONCE` of them runs only where a core
    would else be idle.

    Each operation of training waits for the last of its threads, so a worker that shares a core with one of them holds
    up the others too. A process cannot take this priority back: hence `PATIENCE`.
    """

    def __init__(self, batches: Batches, gives_way: bool) -> None:
        self.batches, self.gives_way, self.at_once = batches, gives_way, AT_ONCE

    def __getitem__(self, number: int) -> Parcel:
        if self.gives_way and self.at_once == 0:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        self.at_once -= 1
        return Parcel.pack(self.batches[number])
