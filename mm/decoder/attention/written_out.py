"""Attention written out, for what torch's scaled_dot_product_attention does not take: soft caps and sinks.

Shape legend: `B` rows, `T` queries, `S` keys, `H` query heads, `G` key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """scores -> cap -> bias and mask -> softmax in float32, a sink in its denominator -> weighted sum."""
    keys, values = to_query_heads(q, k, v)
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)).float() * scale  # (B, H, T, S)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights.to(v.dtype) @ values).transpose(1, 2)


def to_query_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v as (B, H, S, ...): each key/value head repeated for the query heads that share it."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if k.shape[1] == q.shape[2]:
        return k, v
    groups = q.shape[2] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
