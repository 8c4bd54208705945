"""Attention of one query a row, the work of decoding, on a CPU: torch's own is made for many (kernels/one_query.cpp).

Shape legend: `B` rows, `S` keys, `H` query heads, `G` key/value heads, `d` width of a query's or key's head, `e` of a
value's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder import kernels
from mm.decoder.attention.written_out import written_out

DTYPES = (torch.float32, torch.bfloat16)


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q (B, T, H, d) is one query a row on a CPU, all in a dtype that `one_query` takes, with no gradient and
    no autocast, the numbers of a head side by side."""
    return (
        q.is_cpu
        and q.shape[1] == 1
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and k.stride(-1) == 1
        and v.stride(-1) == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, H, d), k (B, S, G, d), v (B, S, G, e) with H a multiple of G, `seen` (B, S) bool or None (all), `sinks`
    (H,) -> (B, H, e), 0 in a row that sees none; scores = softcap(scale * q k^T), a sink in their softmax.

    On a CPU, all three float32 or all bfloat16; scores and sums in float32. A row's result depends, to the last bit, on
    what it sees alone. Raises RuntimeError for shapes and dtypes that do not fit.
    """
    return torch.ops.mm.one_query(q, k, v, seen, scale, softcap or 0.0, None if sinks is None else sinks.float())


def _first(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """What the operator does until its kernel is there, which then stands before this; and where there can be none."""
    compute = torch.ops.mm.one_query if q.is_cpu and kernels.available() else _with_torch
    return compute(q, k, v, seen, scale, softcap, sinks)


def _with_torch(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    mask = None if seen is None else seen[:, None, None]
    if softcap or sinks is not None:
        return written_out(q[:, None], k, v, mask, None, scale, softcap or None, sinks)[:, 0]
    queries = q.unflatten(1, (k.shape[2], -1))  # (B, G, H / G, d): a group's heads as queries of the same keys
    y = F.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    return y.flatten(1, 2)


kernels.library.define(
    "one_query(Tensor q, Tensor k, Tensor v, Tensor? seen, float scale, float softcap, Tensor? sinks) -> Tensor"
)
kernels.library.impl("one_query", _first, "CompositeExplicitAutograd")


@torch.library.register_fake("mm::one_query")
def _(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[3])
