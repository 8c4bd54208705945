"""FlashAttention (package flash-attn, GPU only): packed documents by their lengths, no mask in memory."""

from __future__ import annotations

from torch import Tensor

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
    """As sdpa.attend, for float16/bfloat16 on a GPU. Source: Dao 2023, arXiv 2307.08691 (variable-length form).

    Raises ValueError for what the kernel cannot express: slopes, sinks, sparse patterns, branches, and cached
    decoding; and where the package is not installed.
    """
    packed.refuse("flash", q, v, layout, window, slopes, sinks)
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "attention backend 'flash' needs the package flash-attn (pip install 'mm[gpu]') on a GPU machine; "
            "backend: varlen does the same with torch alone"
        ) from error

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        return flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,  # the kernel's word for none
        )  # fmt: skip

    return packed.attend(kernel, q, k, v, layout, scale, window)
