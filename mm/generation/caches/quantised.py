"""A cache in 8 or 4 bits a number."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mm.decoder.attention.windows import Window
from mm.decoder.cache import Cache, Shift
from mm.decoder.layout import Layout

GROUP = 32  # numbers that share a scale and an offset
LARGEST = torch.finfo(torch.float16).max  # of what is kept; beyond it numbers are cut off


class QuantisedCache(Cache):
    """Keeps everything, rounded as it comes: what a token finds in the cache does not depend on how it was read.

    Each group of 32 numbers is kept as whole numbers of 8 or 4 bits between its least and its largest. A new position
    sees itself rounded too.
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
            packed = pack(x, self.bits)
            parts = self.append(layer, **{f"{name}.{part}": value for part, value in packed.items()})
            tensors.append(unpack(*parts, bits=self.bits, size=x.shape[-1]).to(x.dtype))
        return layout, window, tensors


def pack(x: Tensor, bits: int) -> dict[str, Tensor]:
    """(..., d) -> codes (..., groups * 32) uint8, half as many for 4 bits, two numbers a byte; scale and least of each
    group (..., groups) float16. The last group of a width that is no multiple of 32 is filled up with its last number.
    """
    missing = -x.shape[-1] % GROUP
    full = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1) if missing else x
    groups = full.float().clamp(-LARGEST, LARGEST).unflatten(-1, (-1, GROUP))
    least = groups.amin(-1).half()
    # Measured from the least as it is kept, so that rounding it to 16 bits costs no accuracy of its own.
    above, steps = groups - least.float()[..., None], 2**bits - 1
    scale = (above.amax(-1) / steps).half().clamp(min=torch.finfo(torch.float16).tiny)
    codes = (above / scale.float()[..., None]).round().clamp(0, steps).to(torch.uint8).flatten(-2)
    if bits == 4:
        low, high = codes.chunk(2, -1)
        codes = low | high << 4
    return {"codes": codes, "scale": scale, "least": least}


def unpack(codes: Tensor, scale: Tensor, least: Tensor, bits: int, size: int) -> Tensor:
    """Float32 (..., size) of what `pack` gave."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    groups = codes.unflatten(-1, (-1, GROUP)).float()
    return (groups * scale.float()[..., None] + least.float()[..., None]).flatten(-2)[..., :size]
