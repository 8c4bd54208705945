"""Linear attention: phi(Q) (phi(K)^T V), a recurrence with memory of constant size (Katharopoulos et al. 2020, arXiv
2006.16236)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.attention.paths import Paths
from mm.decoder.attention.scan import scan
from mm.decoder.cache import Cache
from mm.decoder.few_rows import Linear
from mm.decoder.init import Init
from mm.decoder.layout import Layout

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,  # the paper's, equation 7: positive everywhere
    "relu": F.relu,
    "softplus": F.softplus,
}


class LinearAttention(nn.Module):
    """x (B, T, width) -> (B, T, width): causal attention whose weight of key s for query t is phi(q_t) . phi(k_s).

    `heads` heads of `head_dim` (width / heads by default). The weights of a query sum to one (the paper's equation 5),
    or, with `normalise` False, are left as they are. `chunk` is a matter of speed and memory alone. There are no
    positions: order shows through the causal mask only. Documents, branches and padding are kept apart exactly.
    Raises ValueError for a cache with branches.
    """

    def __init__(
        self,
        width: int,
        heads: int = 8,
        head_dim: int | None = None,
        feature: Literal["elu", "relu", "softplus"] = "elu",
        normalise: bool = True,
        bias: bool = False,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"LinearAttention: width {width} is not a multiple of heads {heads}; give head_dim")
        if chunk < 1:
            raise ValueError(f"LinearAttention: chunk {chunk} must be at least 1")
        self.heads, self.head_dim = heads, head_dim or width // heads
        self.feature, self.normalise, self.chunk = FEATURES[feature], normalise, chunk
        self.qkv = Linear(width, 3 * heads * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, width, bias=bias)

    def initialise(self, init: Init) -> None:
        init.normal(self.out.weight, into_residual=True)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None, layer: int = 0) -> Tensor:
        paths = Paths.of(layout, cache)
        state = cache.layers[layer].get("state") if cache is not None else None
        y, state = self._recur(self.qkv(x), paths, state)
        if cache is not None:
            cache.layers[layer] = {"state": state}
        return self.out(y.flatten(2).to(x.dtype))

    def _recur(self, qkv: Tensor, paths: Paths, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, 3 * heads * head_dim) -> (B, T, heads, head_dim) and the state, in float32: long sums need it."""
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, v = qkv.float().unflatten(-1, (3, self.heads, -1)).unbind(2)
            q, k = self.feature(q) * self.head_dim**-0.5, self.feature(k)
            values = F.pad(v, (0, 1), value=1.0) if self.normalise else v  # a column of ones sums the weights
            y, state = scan(values * paths.real[..., None, None], k, q, None, paths, self.chunk, state)
            if self.normalise:
                y = y[..., :-1] / y[..., -1:].clamp(min=1e-6)  # ReLU may see nothing
            return y, state

    def cache_numbers_per_token(self) -> int:
        return 0

    def cache_numbers_fixed(self) -> int:
        """Numbers that this layer's cache keeps for one row, however long."""
        return self.heads * self.head_dim * (self.head_dim + self.normalise)

    def attention_flops(self, context: int) -> int:
        """FLOPs of the recurrence for one position, whatever its context: add to and read each number of the state."""
        return 4 * self.cache_numbers_fixed()

    def kept_numbers(self) -> tuple[int, int]:
        """What the backward pass keeps of one position beyond the matrices' inputs and outputs: numbers in the
        activations' dtype, and in float32."""
        return 0, 8 * self.heads * self.head_dim + self.heads * self.chunk
