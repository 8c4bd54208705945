"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), with multi-head and multi-query as its two ends.

Shape legend: `B` rows, `T` queries, `S` keys, `H` query heads, `G` key/value heads, `d` head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mm.decoder.attention.backends import BACKENDS, Backend, sdpa
from mm.decoder.attention.windows import LocalGlobal, StreamingSinks, seen
from mm.decoder.cache import Cache
from mm.decoder.few_rows import Linear
from mm.decoder.init import Init
from mm.decoder.layout import Layout
from mm.decoder.norms import FullNorm, HeadNorm, RMSNorm
from mm.decoder.positions import Alibi, Rotary, RotaryAlibi


@dataclass(frozen=True)
class QKNorm:
    """How queries and keys are normalised, before the rotation.

    "head"        RMSNorm of each head, one weight for all of them (Qwen3; Gemma 3 with `offset` 1)
    "full"        RMSNorm over all heads together (OLMoE, OLMo 2)
    "head_layer"  LayerNorm of each head, a weight for each, no bias (Cohere)
    """

    kind: Literal["head", "full", "head_layer"] = "head"
    eps: float = 1e-6
    offset: float = 0.0

    def build(self, heads: int, head_dim: int) -> nn.Module:
        if self.kind == "head_layer":
            return HeadNorm(heads, head_dim, self.eps)
        return (
            FullNorm(heads * head_dim, self.eps, self.offset)
            if self.kind == "full"
            else RMSNorm(head_dim, self.eps, self.offset)
        )


@dataclass(frozen=True)
class Scores:
    """What happens to q k^T before and in the softmax.

    `scale` multiplies it; None is 1 / sqrt(head width). `softcap` c then makes it c * tanh(scores / c) (Gemma 2).
    `sinks` adds one learned logit a head to the softmax's denominator: attention to nothing (gpt-oss).
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False


class GroupedAttention(nn.Module):
    """x (B, T, width) -> (B, T, width).

    `heads` query heads of `head_dim` (width / heads by default) share `kv_heads` key/value heads (by default as many as
    heads: MHA; 1: MQA). `positions` is rotary, ALiBi, both mixed over heads, or None. `window` limits what a position
    sees: a number of places (itself included), streaming sinks, or a local and global pattern. `qk_norm` true is
    `QKNorm()`. `bias` is that of queries, keys and values; `out_bias` that of the output, by default as `bias`.
    `clip_qkv` limits queries, keys and values to +- that, after their norms (MPT, OLMo). `gate` multiplies the result,
    before the output matrix, by a sigmoid of the input: a number for each element or for each head (Qwen3-Next; Qiu et
    al. 2025, arXiv 2505.06708).
    """

    def __init__(
        self,
        width: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Rotary | Alibi | RotaryAlibi | None = Rotary(),
        window: int | StreamingSinks | LocalGlobal | None = None,
        qk_norm: bool | QKNorm = False,
        bias: bool = False,
        out_bias: bool | None = None,
        scores: Scores = Scores(),
        clip_qkv: float | None = None,
        gate: Literal["none", "element", "head"] = "none",
        backend: Backend = "sdpa",
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"GroupedAttention: heads {heads} must be a multiple of kv_heads {kv_heads}")
        if head_dim is None and width % heads:
            raise ValueError(f"GroupedAttention: width {width} is not a multiple of heads {heads}; give head_dim")
        if isinstance(window, int) and window < 1:
            raise ValueError(f"GroupedAttention: window {window} must be at least 1: a position sees itself")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim or width // heads
        self.positions, self.window, self.clip_qkv, self.gate_kind = positions, window, clip_qkv, gate
        self.scale = self.head_dim**-0.5 if scores.scale is None else scores.scale
        self.softcap = scores.softcap
        self.attend = BACKENDS[backend]
        # A query sees every key of its row and nothing is added to the scores: rows may differ in length.
        plain = window is None and scores.softcap is None and not scores.sinks
        self.takes_rows = backend in ("sdpa", "auto") and plain and (positions is None or isinstance(positions, Rotary))
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, width, bias=bias if out_bias is None else out_bias)
        norm = QKNorm() if qk_norm is True else qk_norm or None
        self.q_norm = norm.build(heads, self.head_dim) if norm else nn.Identity()
        self.k_norm = norm.build(kv_heads, self.head_dim) if norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(heads)) if scores.sinks else None
        gates = {"none": 0, "element": heads * self.head_dim, "head": heads}[gate]
        self.gate = Linear(width, gates, bias=False) if gates else None

    def initialise(self, init: Init) -> None:
        init.normal(self.out.weight, into_residual=True)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None, layer: int = 0) -> Tensor:
        q, k, v = self._queries_keys_values(x)
        if self.positions is not None:
            q, k = self.positions.rotate(q, k, layout)
        if cache is not None and cache.ragged and self.takes_rows:
            keys, values = cache.extend_rows(layer, keys=k, values=v)
            return self._finish(x, sdpa.attend_rows(q, keys, values, self.scale))
        window = self.window
        if cache is not None:
            shift = None if self.positions is None else self.positions.shift
            layout, window, (k, v) = cache.extend(layer, layout, window, shift, keys=k, values=v)
        y = self.attend(
            q,
            k,
            v,
            layout,
            scale=self.scale,
            window=window,
            slopes=None if self.positions is None else self.positions.slopes(self.heads, q.device),
            softcap=self.softcap,
            sinks=self.sinks,
        )
        if cache is not None:
            cache.attended(layer, q, layout, window, self.scale)
        return self._finish(x, y)

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """The heads' results y (B, T, H, d) through the gate and the output matrix."""
        if self.gate is not None:
            y = y * self.gate(x).sigmoid().view(*y.shape[:3], -1)
        return self.out(y.flatten(2))

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H, d) and twice (B, T, G, d)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (part.clamp(-self.clip_qkv, self.clip_qkv) for part in (q, k, v))
        return q, k, v

    def cache_numbers_per_token(self) -> int:
        """Numbers that this layer's cache keeps for one token."""
        return 2 * self.kv_heads * self.head_dim

    def kept_numbers(self) -> tuple[int, int]:
        """What the backward pass keeps of one position beyond the matrices' inputs and outputs: numbers in the
        activations' dtype (turned queries, keys and values as wide as they) and in float32."""
        return 3 * self.heads * self.head_dim, 0

    def attention_flops(self, context: int) -> int:
        """FLOPs of scores and weighted sum for one query over `context` keys (or what its window leaves of them)."""
        return 4 * self.heads * self.head_dim * seen(self.window, context)
