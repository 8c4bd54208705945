"""Where tensors come from: safetensors in one file or several, or a state dict that torch reads without running code.

A source says the shape of everything before anything is read, and reads one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shape = tuple[int, ...]


class Source(Protocol):
    """`shapes` of every tensor by name; `get` reads one; `file` names, for messages, the file that holds it."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    def get(self, name: str) -> Tensor: ...
    def file(self, name: str) -> Path: ...


class Safetensors:
    """The tensors of safetensors files. Raises ValueError naming a file that is not whole."""

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self._opened: dict[Path, Any] = {}
        for file in files:
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        try:
            tensors = self._opened[file] = safe_open(file, framework="pt")
            for name in tensors.keys():
                if name in self._files:
                    raise ValueError(f"{file}: tensor {name} is also in {self._files[name]}")
                self._files[name], self.shapes[name] = file, tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from error

    def get(self, name: str) -> Tensor:
        return self._opened[self._files[name]].get_tensor(name)

    def file(self, name: str) -> Path:
        return self._files[name]


class StateDict:
    """The tensors of `torch.save`d state dicts, read with `weights_only=True`: a pickle that runs code is refused."""

    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, tensor in self._read(file).items():
                self._tensors[name], self._files[name] = tensor, file
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @staticmethod
    def _read(file: Path) -> dict[str, Tensor]:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # UnpicklingError, RuntimeError, EOFError: torch's reader says it in many ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{file}: not a whole state dict that torch.load(weights_only=True) reads ({reason})"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ValueError(f"{file}: not a state dict: it holds more than named tensors")
        return state

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def file(self, name: str) -> Path:
        return self._files[name]


def open_directory(path: Path) -> Source:
    """The weights of a Hugging Face directory. Raises ValueError naming the file that is missing or damaged."""
    for stem, kind, reader in (("model", "safetensors", Safetensors), ("pytorch_model", "bin", StateDict)):
        index, single = path / f"{stem}.{kind}.index.json", path / f"{stem}.{kind}"
        if index.is_file():
            return _complete(reader(_indexed(index)), index)
        if single.is_file():
            return reader([single])
    raise ValueError(
        f"{path}: no weights: neither model.safetensors nor pytorch_model.bin, nor the .index.json of several files"
    )


def _indexed(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if "/" in name or "\\" in name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: it names the file {name}, which is not there")
    return [index.parent / name for name in names]


def _complete(source: Source, index: Path) -> Source:
    for name, file in _weight_map(index).items():
        if name not in source.shapes:
            raise ValueError(f"{index.parent / file}: tensor {name} is missing, which {index.name} places there")
    return source


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weight files ({error})") from error
