"""GGUF files (github.com/ggml-org/ggml, docs/gguf.md): metadata, and tensors read and dequantised one at a time.

Shape legend: `N` blocks of 32 numbers.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32


@dataclass(frozen=True)
class Format:
    """How numbers are packed: `block` of them in `size` bytes. `read` unpacks (N, size) uint8 to (N, block) float32."""

    name: str
    block: int
    size: int
    read: Callable[[np.ndarray], np.ndarray]


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """A float16 scale, 32 signed bytes."""
    return _half(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """A float16 scale, 32 nibbles less 8."""
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """A float16 scale and smallest number, 32 nibbles."""
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _half(blocks[:, 2:4])


def _half(pairs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pairs).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """(N, 16) bytes -> (N, 32): the low halves, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)


def _bf16(pairs: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(pairs).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


FORMATS = {
    0: Format("F32", 1, 4, lambda x: np.ascontiguousarray(x).view(np.float32)),
    1: Format("F16", 1, 2, _half),
    2: Format("Q4_0", _BLOCK, 18, _q4_0),
    3: Format("Q4_1", _BLOCK, 20, _q4_1),
    8: Format("Q8_0", _BLOCK, 34, _q8_0),
    30: Format("BF16", 1, 2, _bf16),
}


@dataclass(frozen=True)
class _Place:
    shape: Shape
    format: Format
    start: int
    stop: int


class GGUFFile:
    """`metadata` by key, and the tensors, whose `shapes` are in torch's order (the file's dimensions reversed).

    Raises ValueError naming the file: no GGUF, cut off, or a tensor in a format that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if path.stat().st_size < 24 or file.read(4) != b"GGUF":
                raise ValueError(f"{path}: not a GGUF file (other formats are opened by their directory)")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 4
        try:
            self._read_header()
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path}: the file is cut off or damaged (at byte {self._at}: {error})") from error

    def _read_header(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version} is not supported, only 2 and 3 (little-endian)")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        self._places = {name: self._place(name, start, shape, kind, offset) for name, shape, kind, offset in infos}
        self.shapes: dict[str, Shape] = {name: place.shape for name, place in self._places.items()}

    def _tensor_info(self) -> tuple[str, Shape, int, int]:
        name = self._string()
        sizes = [self._scalar("Q") for _ in range(self._scalar("I"))]
        return name, tuple(reversed(sizes)), self._scalar("I"), self._scalar("Q")

    def _place(self, name: str, start: int, shape: Shape, kind: int, offset: int) -> _Place:
        if kind not in FORMATS:
            known = ", ".join(form.name for form in FORMATS.values())
            raise ValueError(f"{self.path}: tensor {name} is of GGML type {kind}, which is not supported; only {known}")
        form, count = FORMATS[kind], math.prod(shape)
        if not shape or shape[-1] % form.block:
            raise ValueError(f"{self.path}: tensor {name} of shape {shape} does not divide into blocks of {form.block}")
        begin = start + offset
        end = begin + count // form.block * form.size
        if end > len(self._data):
            raise ValueError(
                f"{self.path}: the file is cut off: tensor {name} ends at byte {end}, the file at {len(self._data)}"
            )
        return _Place(shape, form, begin, end)

    def get(self, name: str) -> Tensor:
        """The tensor as float32."""
        place = self._places[name]
        packed = np.frombuffer(self._data, np.uint8, place.stop - place.start, place.start)
        return torch.from_numpy(place.format.read(packed.reshape(-1, place.format.size)).reshape(place.shape).copy())

    def file(self, name: str) -> Path:
        return self.path

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._scalar("Q")
        if self._at + size > len(self._data):
            raise IndexError("a text goes beyond the end")
        text = self._data[self._at : self._at + size].decode()
        self._at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar("I"), self._scalar("Q")
            if inner in _SCALARS:
                code = f"<{count}{_SCALARS[inner]}"
                values = struct.unpack_from(code, self._data, self._at)
                self._at += struct.calcsize(code)
                return list(values)
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise IndexError(f"a value of unknown type {kind}")
        value = self._scalar(_SCALARS[kind])
        # A float32 as the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) and _SCALARS[kind] == "f" else value
