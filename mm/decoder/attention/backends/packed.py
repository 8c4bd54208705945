"""What the kernels of variable lengths share: rows laid one after another, documents by their bounds, no mask.

Shape legend: `B` rows, `T` positions, `H` query and `G` key/value heads, `d` width of a query's or key's head, `e` of a
value's.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.attention.windows import Window
from mm.decoder.layout import Layout

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256  # numbers of a head


class Kernel(Protocol):
    """q (N, H, w), k and v (N, G, w) of documents at bounds (documents + 1,) int32, none longer than `longest` ->
    (N, H, w). A query sees its document's keys up to its own place, of these the last `window` (None: all)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor: ...


def refuse(
    name: str,
    q: Tensor,
    v: Tensor,
    layout: Layout,
    window: Window | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None = None,
) -> None:
    """Raises ValueError that names all that a kernel of this kind cannot express."""
    refused = {
        "slopes": slopes is not None,
        "sinks": sinks is not None,
        "a soft cap": softcap is not None,
        "a sparse pattern": window is not None and not isinstance(window, int),
        "a key/value cache": layout.offset > 0,
        "branches": layout.has_branches,
        f"heads of {q.shape[-1]} numbers (at most {WIDEST})": max(q.shape[-1], v.shape[-1]) > WIDEST,
        f"{q.dtype} (float16, bfloat16)".removeprefix("torch."): q.dtype not in DTYPES,
        f"the device {q.device.type} (a GPU)": q.device.type not in DEVICES,
    }
    if what := ", ".join(name for name, present in refused.items() if present):
        raise ValueError(f"attention backend {name!r} does not take {what}; set backend: auto or sdpa")


def attend(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: Window | None
) -> Tensor:
    """q (B, T, H, d), k (B, T, G, d) and v (B, T, G, e) -> (B, T, H, e), 0 at padding.

    The kernels take heads of one width, a multiple of 8, for all three: others are filled up with zeros, which change
    neither scores nor sums.
    """
    assert window is None or isinstance(window, int)
    packed, value_width = layout.packed(), v.shape[-1]
    width = -(-max(q.shape[-1], value_width) // 8) * 8
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = kernel(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), packed.bounds, packed.longest, scale=scale, window=window
    )
    out = out.view(q.shape)[..., :value_width]
    return out if packed.padding is None else out.masked_fill(packed.padding[..., None, None], 0.0)
