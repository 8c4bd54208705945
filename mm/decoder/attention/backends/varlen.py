"""torch's own kernel of variable lengths (GPU only): packed documents by their lengths, no mask, no other package."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mm.decoder.attention.backends import packed
from mm.decoder.attention.windows import Window
from mm.decoder.layout import Layout


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
    """As sdpa.attend, for float16/bfloat16 on a GPU: torch's FlashAttention 2 (Dao 2023, arXiv 2307.08691).

    Raises ValueError for what the kernel cannot express: slopes, sinks, soft caps, sparse patterns, branches, and
    cached decoding.
    """
    packed.refuse("varlen", q, v, layout, window, slopes, sinks, softcap)
    return packed.attend(_kernel, q, k, v, layout, scale, window)


def _kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None) -> Tensor:
    """Key heads are as many as there are, or fewer: the kernel shares them as grouped-query attention does."""
    grouped: dict[str, Any] = {"enable_gqa": True} if k.shape[1] != q.shape[1] and _asks_for_groups() else {}
    # (-1, 0) is all keys up to the query; (w, 0) the w before it and its own.
    sides = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sides, **grouped)
    assert isinstance(out, Tensor)  # a pair only where more than the result is asked for
    return out


@cache
def _asks_for_groups() -> bool:
    """Later torches than 2.11 want to be told that key heads are fewer."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters
