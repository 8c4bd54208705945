"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), with multi-head and multi-query as its two ends."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.decoder.attention.backends import flash, sdpa
from mm.decoder.cache import Cache
from mm.decoder.layout import Layout
from mm.decoder.positions import Alibi, Rotary

BACKENDS = {"sdpa": sdpa.attend, "flash": flash.attend}


class GroupedAttention(nn.Module):
    """x (B, T, width) -> (B, T, width).

    `heads` query heads of `head_dim` (width / heads by default) share `kv_heads` key/value heads (by default as many as
    heads: MHA; 1: MQA). `window` limits how far back a position sees. `positions` is rotary, ALiBi or None. `qk_norm`
    normalises each query and key head (RMSNorm) before the rotation (Qwen3).
    """

    def __init__(
        self,
        width: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Rotary | Alibi | None = Rotary(),
        window: int | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        backend: Literal["sdpa", "flash"] = "sdpa",
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"GroupedAttention: heads {heads} must be a multiple of kv_heads {kv_heads}")
        if head_dim is None and width % heads:
            raise ValueError(f"GroupedAttention: width {width} is not a multiple of heads {heads}; give head_dim")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim or width // heads
        self.positions, self.window = positions, window
        self.attend = BACKENDS[backend]
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, width, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None, layer: int = 0) -> Tensor:
        q, k, v = self._split(self.qkv(x))
        q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(self.positions, Rotary):
            q, k = self.positions.turn(torch.cat([q, k], 2), layout).split([self.heads, self.kv_heads], 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        bias = self.positions.bias(layout, self.heads) if isinstance(self.positions, Alibi) else None
        y = self.attend(q, k, v, layout, scale=self.head_dim**-0.5, window=self.window, bias=bias)
        return self.out(y.flatten(2))

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
        return q, k, v

    def cache_numbers_per_token(self) -> int:
        """Numbers that this layer's cache keeps for one token."""
        return 2 * self.kv_heads * self.head_dim

    def attention_flops(self, context: int) -> int:
        """FLOPs of scores and weighted sum for one query over `context` keys (or its window)."""
        seen = context if self.window is None else min(context, self.window)
        return 4 * self.heads * self.head_dim * seen
