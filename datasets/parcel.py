"""A batch on its way from a worker process to the trainer: all its tensors in one piece of shared memory.

Every tensor that goes by itself is a file descriptor that the trainer has to ask of the worker, some 0.2 ms each, and
more where the worker has a low priority; a batch has two or three dozen tensors.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and more than any dtype needs


@dataclass(frozen=True)
class Parcel:
    """`contents` is the pickled object, with the numbers of its tensors in their places. Tensor i stands at `places[i]`
    (first byte, dtype, shape) of `memory` (bytes,) uint8."""

    contents: bytes
    places: list[tuple[int, torch.dtype, torch.Size]]
    memory: Tensor

    @staticmethod
    def pack(item: Any) -> Parcel:
        """Tensors must be on the CPU and dense, and need not be contiguous. They are copied here, and all together into
        shared memory where a queue takes the parcel."""
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(item)
        places, size = [], 0
        for tensor in packer.tensors:
            places.append((size, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8)
        parcel = Parcel(file.getvalue(), places, memory)
        for place, tensor in zip(places, packer.tensors, strict=True):
            parcel._at(place).copy_(tensor)
        return parcel

    def open(self) -> Any:
        """The object as it was packed; its tensors are views of `memory`."""
        return _Opener(self).load()

    def _at(self, place: tuple[int, torch.dtype, torch.Size]) -> Tensor:
        first, dtype, shape = place
        return self.memory[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]


class _Opener(pickle.Unpickler):
    def __init__(self, parcel: Parcel) -> None:
        super().__init__(io.BytesIO(parcel.contents))
        self._tensors = [parcel._at(place) for place in parcel.places]

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
