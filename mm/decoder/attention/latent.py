"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

Shape legend: `B` rows, `T` queries, `S` keys, `H` heads, `n` unrotated and `p` rotated numbers of a query or key head,
`v` numbers of a value head, `r` the latent's rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.attention.backends import BACKENDS, Backend
from mm.decoder.attention.one_query import one_query, suits
from mm.decoder.attention.windows import Window
from mm.decoder.cache import Cache
from mm.decoder.few_rows import Linear
from mm.decoder.init import Init
from mm.decoder.layout import Layout
from mm.decoder.norms import RMSNorm
from mm.decoder.positions import Rotary


class LatentAttention(nn.Module):
    """x (B, T, width) -> (B, T, width). Keys and values are made from one latent of `kv_rank` numbers a token.

    Each head's query and key are `nope_dim` numbers without positions, the key's from the latent, and `rope_dim`
    rotated ones, the key's shared by all heads. `q_rank` makes queries from a latent too (None: straight from x).
    `scale` multiplies the scores; None is (nope_dim + rope_dim)^-0.5, and YaRN models have that times
    yarn_mscale(factor, mscale_all_dim)^2. `bias` is that of the projections down to the latents and of the output.
    DeepSeek's own rotary layout is `pairs: adjacent`.

    The cache holds the latent and the rotated key: kv_rank + rope_dim numbers a token, not the heads. To decode, the
    matrices that make keys and values out of the latent are absorbed into the query and the result, so that all heads
    attend to the latents themselves; for many queries at once it is cheaper to make the heads, and the same.
    """

    def __init__(
        self,
        width: int,
        heads: int = 8,
        kv_rank: int = 512,
        q_rank: int | None = None,
        nope_dim: int = 128,
        rope_dim: int = 64,
        v_dim: int = 128,
        positions: Rotary = Rotary(pairs="adjacent"),
        scale: float | None = None,
        bias: bool = False,
        eps: float = 1e-6,
        backend: Backend = "sdpa",
    ) -> None:
        super().__init__()
        for name, size in (("heads", heads), ("kv_rank", kv_rank), ("nope_dim", nope_dim), ("v_dim", v_dim)):
            if size < 1:
                raise ValueError(f"LatentAttention: {name} must be positive, not {size}")
        if rope_dim < 2 or rope_dim % 2:
            raise ValueError(f"LatentAttention: rope_dim {rope_dim} must be a positive even number")
        self.heads, self.kv_rank, self.nope_dim, self.rope_dim, self.v_dim = heads, kv_rank, nope_dim, rope_dim, v_dim
        self.positions, self.attend = positions, BACKENDS[backend]
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        queries = heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.q = Linear(width, queries, bias=False)
        else:
            self.q_down, self.q_norm = Linear(width, q_rank, bias=bias), RMSNorm(q_rank, eps)
            self.q = Linear(q_rank, queries, bias=False)
        self.q_rank = q_rank
        self.kv_down, self.kv_norm = Linear(width, kv_rank + rope_dim, bias=bias), RMSNorm(kv_rank, eps)
        self.kv_up = Linear(kv_rank, heads * (nope_dim + v_dim), bias=False)
        self.out = Linear(heads * v_dim, width, bias=bias)

    def initialise(self, init: Init) -> None:
        init.normal(self.out.weight, into_residual=True)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None, layer: int = 0) -> Tensor:
        q = self.q(x if self.q_rank is None else self.q_norm(self.q_down(x))).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], -1)
        latent, k_rope = self.kv_down(x).split([self.kv_rank, self.rope_dim], -1)
        latent = self.kv_norm(latent)
        q_rope, k_rope = self.positions.rotate(q_rope, k_rope[:, :, None], layout)
        k_rope = k_rope[:, :, 0]
        window = None
        if cache is not None:
            shift = self.positions.shift
            layout, window, (k_rope, latent) = cache.extend(layer, layout, None, shift, rope_key=k_rope, latent=latent)
        attend = self._absorbed if self._absorbing_is_cheaper(layout) else self._expanded
        return self.out(attend(q_nope, q_rope, latent, k_rope, layout, window).flatten(2))

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, layout: Layout, window: Window | None
    ) -> Tensor:
        """Heads made from the latents: q (B, T, H, n | p), latent (B, S, r), k_rope (B, S, p) -> (B, T, H, v)."""
        k_nope, v = self.kv_up(latent).unflatten(-1, (self.heads, -1)).split([self.nope_dim, self.v_dim], -1)
        k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return self.attend(torch.cat([q_nope, q_rope], -1), k, v, layout, scale=self.scale, window=window)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, layout: Layout, window: Window | None
    ) -> Tensor:
        """The same, every head reading the latents: (q W_k) . c = q . (W_k c), and W_v (sum p c) = sum p (W_v c)."""
        up = self.kv_up.weight.to(latent.dtype).view(self.heads, self.nope_dim + self.v_dim, self.kv_rank)
        w_key, w_value = up.split([self.nope_dim, self.v_dim], 1)  # (H, n, r), (H, v, r)
        q = torch.cat([torch.einsum("bthn,hnr->bthr", q_nope, w_key), q_rope], -1)
        # One key head for all: heads stand as more queries of it, so nothing is repeated in memory.
        keys = torch.cat([latent, k_rope], -1)
        mask = layout.mask(window).expand(len(q), -1, -1, -1)
        if suits(q, keys, latent):
            read = one_query(q[:, 0], keys[:, :, None], latent[:, :, None], mask[:, 0, 0], self.scale)
        else:
            mask = mask.repeat_interleave(self.heads, 2)  # (B, 1, T*H, S)
            queries = q.flatten(1, 2)[:, None]
            read = F.scaled_dot_product_attention(queries, keys[:, None], latent[:, None], mask, scale=self.scale)
        return torch.einsum("bthr,hvr->bthv", read.reshape(*q.shape[:3], self.kv_rank), w_value)

    def _absorbing_is_cheaper(self, layout: Layout) -> bool:
        """Products a head: absorbed T*S*(2r + p) + T*r*(n + v), expanded T*S*(n + p + v) + S*r*(n + v)."""
        if layout.offset == 0:
            return False  # nothing cached: the heads of what is new have to be made anyway
        queries, keys = layout.queries.index.shape[1], layout.keys.index.shape[1]
        heads = self.nope_dim + self.v_dim
        absorbed = queries * keys * (2 * self.kv_rank + self.rope_dim) + queries * self.kv_rank * heads
        return absorbed < queries * keys * (heads + self.rope_dim) + keys * self.kv_rank * heads

    def cache_numbers_per_token(self) -> int:
        """The latent and the rotated key."""
        return self.kv_rank + self.rope_dim

    def kept_numbers(self) -> tuple[int, int]:
        """What the backward pass keeps of one position beyond the matrices' inputs and outputs: numbers in the
        activations' dtype (queries and keys put together) and in float32."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim), 0

    def attention_flops(self, context: int) -> int:
        """FLOPs of scores and weighted sum for one query over `context` keys, the heads made (as in training)."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.v_dim) * context
