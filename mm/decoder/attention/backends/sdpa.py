"""torch's scaled_dot_product_attention, and the same maths written out for what that does not take.

Runs everywhere, and is what the other backends are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.attention.windows import Window
from mm.decoder.layout import Layout

# Below this length one masked call beats a Python loop over documents (benchmarks/attention.py).
LOOP_FROM = 512


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: Window | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, T, H, d), k (B, S, G, d) and v (B, S, G, e) with H a multiple of G -> (B, T, H, e).

    Packed documents without branches, cache or window are attended to one by one once rows are long; short rows and
    everything else take one call with a mask, made once a forward pass. Soft caps and sinks write the scores out.
    """
    if softcap is not None or sinks is not None:
        return _written_out(q, k, v, layout.mask(window), bias, scale, softcap, sinks)
    if bias is not None:
        if window is not None:
            bias = bias.masked_fill(~layout.mask(window), float("-inf"))
        return _sdpa(q, k, v, bias.to(q.dtype), False, scale)
    if window is not None:
        return _sdpa(q, k, v, layout.mask(window), False, scale)
    if layout.is_plain_causal:
        return _sdpa(q, k, v, None, True, scale)
    if layout.offset == 0 and not layout.has_branches and layout.keys.index.shape[1] >= LOOP_FROM:
        return _by_document(q, k, v, layout, scale)
    return _sdpa(q, k, v, layout.mask(), False, scale)


def attend_rows(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """One query of each row, q (B, 1, H, d), that sees all of its row's keys (S_row, G, d) and values (S_row, G, e)
    -> (B, 1, H, e). What a long row has costs the short ones nothing."""
    groups = keys[0].shape[1]
    grouped = q.unflatten(2, (groups, -1)).unbind(0)  # (1, G, H / G, d): a group's heads as queries of the same keys
    parts = [
        F.scaled_dot_product_attention(row, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
        for row, k, v in zip(grouped, keys, values, strict=True)
    ]
    return torch.cat(parts).flatten(1, 2)[:, None]


def _by_document(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    out = None if torch.is_grad_enabled() else q.new_empty(*q.shape[:-1], v.shape[-1])
    parts = []
    for row, start, end in layout.documents():
        part = _sdpa(
            q[row : row + 1, start:end], k[row : row + 1, start:end], v[row : row + 1, start:end], None, True, scale
        )
        if out is None:
            parts.append(part)
        else:
            out[row, start:end] = part[0]
    return torch.cat(parts, 1).view(*q.shape[:-1], v.shape[-1]) if out is None else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    if q.shape[1] == 1 and groups > 1 and (mask is None or mask.shape[1] == 1):
        # One query: those of the heads that share a key stand as so many queries of it, and no key is repeated.
        q = q.view(len(q), k.shape[2], groups, -1)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).flatten(1, 2)[:, None]
    q, k, v = q.transpose(1, 2), *_to_query_heads(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)


def _to_query_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v as (B, H, S, ...): each key/value head repeated for the query heads that share it."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if k.shape[1] == q.shape[2]:
        return k, v
    groups = q.shape[2] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """scores -> cap -> bias and mask -> softmax in float32, a sink in its denominator -> weighted sum."""
    keys, values = _to_query_heads(q, k, v)
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)).float() * scale  # (B, H, T, S)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights.to(v.dtype) @ values).transpose(1, 2)
