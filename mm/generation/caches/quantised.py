"""A cache in 8 or 4 bits a number."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mm.decoder.attention.windows import Window
from mm.decoder.cache import Cache, Shift
from mm.decoder.layout import Layout

GROUP = 32  # numbers that share a scale and an offset, where they are 4 bits each


class QuantisedCache(Cache):
    """Keeps everything, rounded as it comes: what a token finds in the cache does not depend on how it was read.

    8 bits: whole numbers from -127 to 127, times the largest magnitude of each head's vector / 127. 4 bits: whole
    numbers from 0 to 15 between the least and the largest of each group of 32. A new position sees itself rounded too.
    """

    def __init__(self, layers: int, bits: Literal[4, 8] = 8) -> None:
        super().__init__(layers)
        if bits not in (4, 8):
            raise ValueError(f"QuantisedCache.bits={bits}: give 4 or 8")
        self.bits = bits

    def extend(
        self, layer: int, layout: Layout, window: Window | None = None, shift: Shift | None = None, **new: Tensor
    ) -> tuple[Layout, Window | None, list[Tensor]]:
        tensors = []
        for name, x in new.items():
            packed = to_int8(x) if self.bits == 8 else to_int4(x)
            parts = self.append(layer, **{f"{name}.{part}": value for part, value in packed.items()})
            whole = from_int8(*parts) if self.bits == 8 else from_int4(*parts, size=x.shape[-1])
            tensors.append(whole.to(x.dtype))
        return layout, window, tensors


def to_int8(x: Tensor) -> dict[str, Tensor]:
    """(..., d) -> codes (..., d) int8 and scale (..., 1) float32."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"codes": (x.float() / scale).round().to(torch.int8), "scale": scale}


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """Float32 (..., d) of what `to_int8` gave."""
    return codes.float() * scale


def to_int4(x: Tensor) -> dict[str, Tensor]:
    """(..., d) -> codes (..., ceil(d / 32) * 16) uint8, two numbers a byte, and scale and least (..., groups) float16.

    The last group of a width that is no multiple of 32 is filled up with its last number.
    """
    missing = -x.shape[-1] % GROUP
    full = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1) if missing else x
    groups = full.float().unflatten(-1, (-1, GROUP))
    least = groups.amin(-1).half()
    # Measured from the least as it is kept, so that rounding it to 16 bits costs no accuracy of its own.
    scale = ((groups - least.float()[..., None]).amax(-1) / 15).half().clamp(min=torch.finfo(torch.float16).tiny)
    codes = ((groups - least.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15).to(torch.uint8)
    low, high = codes.flatten(-2).chunk(2, -1)
    return {"codes": low | high << 4, "scale": scale, "least": least}


def from_int4(codes: Tensor, scale: Tensor, least: Tensor, size: int) -> Tensor:
    """Float32 (..., size) of what `to_int4` gave."""
    groups = torch.cat([codes & 15, codes >> 4], -1).unflatten(-1, (-1, GROUP)).float()
    return (groups * scale.float()[..., None] + least.float()[..., None]).flatten(-2)[..., :size]
