"""torch's FlexAttention: soft caps, sinks, windows, patterns, packing and branches in one fused kernel on CUDA.

On a CPU the same code runs unfused and for inference only: there it serves tests, and `sdpa` is the one to use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from mm.decoder.attention.windows import Window, sees
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
    """As sdpa.attend (Dong et al. 2024, arXiv 2412.05496). Blocks of 128 x 128 in which nothing is seen are skipped.

    Raises ValueError where gradients are wanted on a CPU.
    """
    if not q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention backend 'flex' has no backward pass on a CPU; set backend: sdpa")
    kernel: Any = _compiled() if q.is_cuda else flex_attention
    y = kernel(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=_score_mod(layout, slopes, softcap),
        block_mask=layout.remember(("flex", window), lambda: _block_mask(layout, window)),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=None if sinks is None else AuxRequest(lse=True),  # compiled for a CPU it can say none
    )
    if sinks is not None:
        y, aux = y
        # exp(sink) more in the denominator: sum / (sum + exp(sink)) = sigmoid(log(sum) - sink)
        y = y * (aux.lse - sinks.float()[:, None]).sigmoid()[..., None].to(y.dtype)
    return y.transpose(1, 2)


def _score_mod(layout: Layout, slopes: Tensor | None, softcap: float | None) -> Callable[..., Tensor] | None:
    if slopes is None and softcap is None:
        return None
    queries, keys = layout.queries.index, layout.keys.index

    def change(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes is None else score - slopes[head] * (queries[row, query] - keys[row, key])

    return change


def _block_mask(layout: Layout, window: Window | None) -> BlockMask:
    """The layout's rule of who sees whom, for each query and key by their columns."""
    q, k, offset = layout.queries, layout.keys, layout.offset

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query + offset) & (q.document_ids[row, query] == k.document_ids[row, key])
        branch = k.branch_ids[row, key]
        seen = seen & ((branch == 0) | (branch == q.branch_ids[row, query]))
        return seen if window is None else seen & sees(window, q.index[row, query], k.index[row, key])

    (rows, queries), keys = q.index.shape, k.index.shape[1]
    return create_block_mask(visible, rows, None, queries, keys, device=q.index.device)


@cache
def _compiled() -> Any:
    """The fused kernel, compiled when it is first used."""
    return torch.compile(flex_attention)
