"""FlashAttention (package flash-attn, GPU only): packed documents by their lengths, no mask in memory."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """As sdpa.attend, for float16/bfloat16 on a GPU. Source: Dao 2023, arXiv 2307.08691 (variable-length form).

    Raises ValueError for what the kernel cannot express: slopes, sinks, sparse patterns, branches, and cached
    decoding.
    """
    refused = {
        "slopes": slopes is not None,
        "sinks": sinks is not None,
        "a sparse pattern": window is not None and not isinstance(window, int),
        "branches": layout.has_branches,
        "a key/value cache": layout.offset > 0,
    }
    if what := ", ".join(name for name, present in refused.items() if present):
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
    assert window is None or isinstance(window, int)
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
        softcap=softcap or 0.0,  # the kernel's word for none
    )
    return out.view(*q.shape[:-1], v.shape[-1])
