"""Caches by name, for a model."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

from mm.decoder.attention.windows import StreamingSinks
from mm.decoder.cache import Cache
from mm.decoder.ffn.moe import moe_layers
from mm.generation.caches.evicting import EvictingCache
from mm.generation.caches.graph import on_cuda
from mm.generation.caches.quantised import QuantisedCache
from mm.generation.caches.static import StaticCache
from mm.generation.caches.windowed import WindowedCache

CACHES = {
    "dynamic": "everything",
    "static": "everything, in tensors of fixed length, with a compiled step; exact",
    "window": "of layers with a sliding window what it may still show, of others everything; exact",
    "sinks:FIRST+LAST": "of every layer the first and the last positions, and the memory stays the same for ever",
    "int8": "everything, in 8 bits a number",
    "int4": "everything, in 4 bits a number",
    "evict:BUDGET": "of every layer so many positions, those that recent ones attended to",
}


def check(name: str) -> None:
    """Raises ValueError for a name that is none of `CACHES`, or sizes that make no sense."""
    if name not in ("dynamic", "static"):
        maker, numbers = _maker(name)
        maker(None, 0, *numbers)


def make(model: Any, name: str) -> Cache:
    """A new cache for `model`, of the kind that `name` says (`CACHES`).

    Raises ValueError for an unknown name, and for a kind that the model's decoder cannot have, saying why.
    """
    if name == "dynamic":
        return model.new_cache()
    maker, numbers = _maker(name)
    decoder = getattr(model, "decoder", None)
    if decoder is None or decoder.rereader.lengths:
        raise ValueError(
            f"cache={name!r}: the model's cache is more than what attention keeps (LongRoPE reads it again at its "
            "original length); use dynamic"
        )
    if name.startswith("sinks") and decoder.embed_positions is not None:
        raise ValueError(f"cache={name!r}: this model adds positions to its input, so none can seem nearer than it is")
    return maker(model, len(decoder.layers), *numbers)


def _static(model: Any, layers: int) -> StaticCache:
    if any(hasattr(module, "cache_numbers_fixed") for module in model.decoder.modules()):
        raise ValueError("cache='static': recurrent layers (Mamba-2, linear attention) keep no positions; use dynamic")
    if model.device.type == "cpu" and not _has_compiler():
        raise ValueError("cache='static' compiles the step, which takes a C++ compiler (g++ or clang++); use dynamic")
    # No graph can wait for a host that asks how many tokens each expert has.
    captures = model.device.type == "cuda" and all(
        layer.experts.groups(model.device, layer.experts.down.dtype) for layer in moe_layers(model.decoder.layers)
    )
    return StaticCache(layers, model.compiled_step, on_cuda if captures else None)


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"))


def _maker(name: str) -> tuple[Callable[..., Cache], list[int]]:
    """What makes a cache of (model, layers, numbers), and the numbers in the name."""
    for pattern, maker in _MAKERS.items():
        if found := re.fullmatch(pattern, name):
            return maker, [int(number) for number in found.groups()]
    raise ValueError(f"cache={name!r}: give one of {', '.join(CACHES)}")


_MAKERS: dict[str, Callable[..., Cache]] = {
    r"static": _static,
    r"window": lambda model, layers: WindowedCache(layers),
    r"sinks:(\d+)\+(\d+)": lambda model, layers, first, last: WindowedCache(layers, StreamingSinks(first, last)),
    r"int8": lambda model, layers: QuantisedCache(layers, 8),
    r"int4": lambda model, layers: QuantisedCache(layers, 4),
    r"evict:(\d+)": lambda model, layers, budget: EvictingCache(layers, budget),
}
