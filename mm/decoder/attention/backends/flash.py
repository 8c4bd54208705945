"""FlashAttention (package flash-attn, GPU only): packed documents by their lengths, no mask in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.decoder.layout import Layout


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, window: int | None, bias: Tensor | None
) -> Tensor:
    """As sdpa.attend, for float16/bfloat16 on a GPU. Source: Dao 2023, arXiv 2307.08691 (variable-length form).

    Raises ValueError for what the kernel cannot express: score biases other than none, branches, and cached decoding.
    """
    if bias is not None or layout.has_branches or layout.offset:
        what = "a score bias" if bias is not None else "branches" if layout.has_branches else "a key/value cache"
        raise ValueError(f"attention backend 'flash' does not take {what}; set backend: sdpa")
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "attention backend 'flash' needs the package flash-attn (pip install 'mm[gpu]') on a GPU machine"
        ) from error
    lengths = torch.tensor([end - start for _, start, end in layout.documents()], dtype=torch.int32, device=q.device)
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return out.view_as(q)
