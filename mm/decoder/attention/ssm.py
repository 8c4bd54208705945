"""Mamba-2: a selective state-space model as a mixer (Dao and Gu 2024, arXiv 2405.21060).

Shape legend: `B` rows, `T` positions, `D` width, `H` heads of width `P`, `I` = H * P inner width, `G` groups, `N` state
size, `K` taps of the convolution, `C` = I + 2 G N channels that it runs over.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.attention.paths import Paths
from mm.decoder.attention.scan import scan
from mm.decoder.cache import Cache
from mm.decoder.few_rows import Linear
from mm.decoder.init import Init
from mm.decoder.layout import Layout


class Mamba2(nn.Module):
    """x (B, T, width) -> (B, T, width), with memory of constant size.

    `heads` of `head_dim` (by default as many as make the inner width twice `width`) keep a state of `state` numbers for
    each of their channels; `groups` of heads share what writes into it and reads from it. `conv` taps of a causal
    convolution stand before. `dt_limit` bounds the time step. `chunk` is a matter of speed and memory alone.

    Packed documents, branches and padding are kept apart exactly: each document starts from an empty state and an empty
    convolution, each branch from those at the end of its common part.
    Raises ValueError for heads that are not a multiple of groups, and for a cache with branches.
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        head_dim: int = 64,
        state: int = 128,
        groups: int = 1,
        conv: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        chunk: int = 64,
        dt_limit: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if heads is None and 2 * width % head_dim:
            raise ValueError(f"Mamba2: twice width {width} is not a multiple of head_dim {head_dim}; give heads")
        heads = heads or 2 * width // head_dim
        if heads % groups:
            raise ValueError(f"Mamba2: heads {heads} must be a multiple of groups {groups}")
        if min(conv, chunk, state) < 1:
            raise ValueError(f"Mamba2: conv {conv}, chunk {chunk} and state {state} must be at least 1")
        self.heads, self.head_dim, self.state, self.groups = heads, head_dim, state, groups
        self.inner, self.chunk, self.dt_limit = heads * head_dim, chunk, dt_limit
        channels = self.inner + 2 * groups * state
        self.in_proj = Linear(width, self.inner + channels + heads, bias=bias)
        self.conv = CausalConv(channels, conv, conv_bias)
        self.a_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = GatedGroupNorm(self.inner, groups, eps)
        self.out = Linear(self.inner, width, bias=bias)
        self._reset()

    def initialise(self, init: Init) -> None:
        init.normal(self.out.weight, into_residual=True)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        """Decay rates spread over 1 to 16, time steps over 0.001 to 0.1 evenly in the logarithm (the paper's code)."""
        self.a_log.uniform_(1, 16).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        nn.init.ones_(self.skip)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None, layer: int = 0) -> Tensor:
        paths = Paths.of(layout, cache)
        kept = cache.layers[layer] if cache is not None else {}
        gate, mixed, dt = self.in_proj(x).split([self.inner, self.conv.channels, self.heads], -1)
        mixed, tail = self.conv(mixed, paths, kept.get("tail"))
        y, state = self._recur(F.silu(mixed), dt, paths, kept.get("state"))
        if cache is not None:
            cache.layers[layer] = {"tail": tail, "state": state}
        return self.out(self.norm(y, gate))

    def _recur(self, mixed: Tensor, dt: Tensor, paths: Paths, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The convolved channels (B, T, C) and raw time steps (B, T, H) -> (B, T, I) and the state, in float32."""
        with torch.autocast(mixed.device.type, enabled=False):
            width = self.groups * self.state
            x, b, c = mixed.float().split([self.inner, width, width], -1)
            x, b, c = (part.unflatten(-1, (n, -1)) for part, n in ((x, self.heads), (b, self.groups), (c, self.groups)))
            dt = F.softplus(dt.float() + self.dt_bias.float())
            if self.dt_limit is not None:
                dt = dt.clamp(*self.dt_limit)
            dt = dt * paths.real[..., None]  # a step of no time: padding neither adds nor fades
            decay = -dt * self.a_log.float().exp()
            y, state = scan(x * dt[..., None], b, c, decay, paths, self.chunk, state)
            return (y + self.skip.float()[:, None] * x).flatten(2), state

    def cache_numbers_per_token(self) -> int:
        return 0

    def cache_numbers_fixed(self) -> int:
        """Numbers that this layer's cache keeps for one row, however long: the state, and the convolution's tail."""
        return self.inner * self.state + (self.conv.taps - 1) * self.conv.channels

    def attention_flops(self, context: int) -> int:
        """FLOPs of the recurrence for one position, whatever its context: fade, add to and read the state."""
        return 5 * self.inner * self.state

    def kept_numbers(self) -> tuple[int, int]:
        """What the backward pass keeps of one position beyond the matrices' inputs and outputs: numbers in the
        activations' dtype (the convolution's) and in float32 (the scan's)."""
        states = 2 * self.inner * self.state // self.chunk
        return (self.conv.taps + 1) * self.conv.channels, 8 * self.inner + 2 * self.heads * self.chunk + states


class CausalConv(nn.Module):
    """Depthwise convolution along each path: (B, T, C) -> the same, and the inputs that the next pass looks back on."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.channels, self.taps = channels, taps
        self.weight = nn.Parameter(torch.empty(channels, taps))  # the last tap is the position itself
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self._reset()

    def initialise(self, init: Init) -> None:
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        nn.init.uniform_(self.weight, -(self.taps**-0.5), self.taps**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, paths: Paths, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        looks, tail = paths.look_back(x, tail, self.taps)
        weight = self.weight.to(x.dtype)
        y = sum(look * weight[:, self.taps - 1 - back] for back, look in enumerate(looks))
        assert isinstance(y, Tensor)
        return (y if self.bias is None else y + self.bias.to(x.dtype)), tail


class GatedGroupNorm(nn.Module):
    """RMSNorm of y * silu(gate) over each of `groups` equal parts of the last axis; in float32, then gate's dtype."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        gated = (y.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        return (F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2) * self.weight.float()).to(gate.dtype)
