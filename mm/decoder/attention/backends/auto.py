"""The fastest backend that can express a call: a rule that can be read, asked and tested, and no trying out."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mm.decoder.attention.backends import flash, flex, packed, sdpa, varlen
from mm.decoder.attention.windows import Window
from mm.decoder.layout import Layout


@dataclass(frozen=True)
class Ask:
    """All that the choice goes by. `width` is that of the widest head; `pattern` a window that is more than a number of
    places; `cached` says that keys stand before the queries, `has_flash` that the package flash-attn is there."""

    device: str
    dtype: torch.dtype
    width: int = 64
    pattern: bool = False
    slopes: bool = False
    softcap: bool = False
    sinks: bool = False
    branches: bool = False
    cached: bool = False
    has_flash: bool = False


def choose(ask: Ask) -> str:
    """A backend's name.

    sdpa    on a CPU, for cached keys (decoding), in float32, and for heads that no kernel takes
    flash   on a GPU with the package flash-attn, whatever its kernel can express
    varlen  the same with torch's kernel: no soft caps
    flex    what is left: sinks, slopes, patterns, branches, soft caps
    """
    if ask.device != "cuda" or ask.cached or ask.dtype not in packed.DTYPES or ask.width > packed.WIDEST:
        return "sdpa"
    if ask.pattern or ask.slopes or ask.sinks or ask.branches:
        return "flex"
    if ask.has_flash:
        return "flash"
    return "flex" if ask.softcap else "varlen"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: Window | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As sdpa.attend, by the backend that `choose` says. What that one refuses is not tried elsewhere."""
    ask = Ask(
        device=q.device.type,
        dtype=q.dtype,
        width=max(q.shape[-1], v.shape[-1]),
        pattern=window is not None and not isinstance(window, int),
        slopes=slopes is not None,
        softcap=softcap is not None,
        sinks=sinks is not None,
        branches=q.device.type == "cuda" and layout.has_branches,
        cached=layout.offset > 0,
        has_flash=q.device.type == "cuda" and has_flash(),
    )
    backend = {"sdpa": sdpa, "flash": flash, "varlen": varlen, "flex": flex}[choose(ask)]
    return backend.attend(q, k, v, layout, scale=scale, window=window, slopes=slopes, softcap=softcap, sinks=sinks)


@cache
def has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
