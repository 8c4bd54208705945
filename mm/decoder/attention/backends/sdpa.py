"""torch's scaled_dot_product_attention: runs everywhere, and is what the other backends are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.layout import Layout

# Below this length one masked call beats a Python loop over documents (benchmarks/attention.py).
LOOP_FROM = 512


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, window: int | None, bias: Tensor | None
) -> Tensor:
    """q (B, T, H, d), k and v (B, S, G, d) with H a multiple of G -> (B, T, H, d).

    Packed documents without branches, cache or window are attended to one by one once rows are long; short rows and
    everything else take one call with a mask, made once a forward pass.
    """
    if bias is None and window is None and not layout.is_plain_causal and _by_document(layout):
        out = torch.empty_like(q) if not torch.is_grad_enabled() else None
        parts = []
        for row, start, end in layout.documents():
            part = _sdpa(
                q[row : row + 1, start:end], k[row : row + 1, start:end], v[row : row + 1, start:end], None, True, scale
            )
            if out is None:
                parts.append(part)
            else:
                out[row, start:end] = part[0]
        return torch.cat(parts, 1).view_as(q) if out is None else out
    if bias is None and window is None and layout.is_plain_causal:
        return _sdpa(q, k, v, None, True, scale)
    if bias is None:
        return _sdpa(q, k, v, layout.mask(window), False, scale)
    if window is not None:
        bias = bias.masked_fill(~layout.mask(window), float("-inf"))
    return _sdpa(q, k, v, bias.to(q.dtype), False, scale)


def _by_document(layout: Layout) -> bool:
    return layout.offset == 0 and not layout.has_branches and layout.keys.index.shape[1] >= LOOP_FROM


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)
