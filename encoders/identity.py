"""What a tower's features depend on, so that stored ones can be told from those that another tower would make."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

HOW_IT_RUNS = {"training", "freeze"}  # and not what it computes


def identity(tokenizer: Any, encoder: nn.Module) -> dict[str, Any]:
    """Settings of the media tokenizer and of the encoder by name, and two SHA-256: of the encoder's architecture, which
    is its modules and their settings, and of its weights and buffers, in the dtype that they have.

    The same for a model and its saved directory; for another device; for frozen weights and learning ones.
    """
    return {
        "tokenizer": settings(tokenizer),
        "encoder": settings(encoder),
        "architecture": _architecture(encoder),
        "weights": _weights(encoder),
    }


def settings(part: Any) -> dict[str, Any]:
    """The class and the public attributes that JSON can hold, those of parts of the same package within it."""
    found: dict[str, Any] = {"class": f"{type(part).__module__}.{type(part).__qualname__}"}
    for name, value in sorted(vars(part).items()):
        if name.startswith("_") or name in HOW_IT_RUNS:
            continue
        if _is_plain(value):
            found[name] = list(value) if isinstance(value, tuple) else value
        elif _package(value) == _package(part) and hasattr(value, "__dict__"):
            found[name] = settings(value)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _architecture(encoder: nn.Module) -> str:
    """Of what the modules print, and of the settings of the encoder's own: a transformer's heads show in no weight."""
    own = {name: settings(part) for name, part in encoder.named_modules() if _package(part) == _package(encoder)}
    return hashlib.sha256(f"{encoder}\n{json.dumps(own, sort_keys=True)}".encode()).hexdigest()


def _weights(encoder: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted([*encoder.named_parameters(), *encoder.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
