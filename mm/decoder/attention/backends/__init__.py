"""Attention backends: one signature, `attend(q, k, v, layout, options)`, and several ways to compute it.

    attend(q (B, T, H, d), k (B, S, G, d), v (B, S, G, e), layout, *, scale, window=None, slopes=None, softcap=None,
           sinks=None) -> (B, T, H, e)

H is a multiple of G, the layout says who sees whom. scores = softcap(scale * q k^T) - slopes * distance, with `slopes`
(H,) float32 (ALiBi); `sinks` (H,) are logits that join each softmax's denominator. A backend refuses what it cannot
express, naming it; none falls back to another. `auto` chooses one of the others by a rule (auto.choose).
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from mm.decoder.attention.backends import auto, flash, flex, sdpa, varlen
from mm.decoder.attention.windows import Window
from mm.decoder.layout import Layout

Backend = Literal["sdpa", "flash", "varlen", "flex", "auto"]


class Attend(Protocol):
    def __call__(
        self,
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
    ) -> Tensor: ...


BACKENDS: dict[str, Attend] = {
    "sdpa": sdpa.attend,
    "flash": flash.attend,
    "varlen": varlen.attend,
    "flex": flex.attend,
    "auto": auto.attend,
}
