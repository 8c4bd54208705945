"""Positions for attention: rotary over one axis or several, ALiBi, and both mixed over heads.

A scheme belongs to a mixer and holds no parameters. `rotate` turns queries and keys; `slopes` lower the scores. The
position embeddings that are added to the stream once (learned, sinusoidal) are in embedding.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.decoder.layout import Layout
from mm.decoder.rope_scaling import RopeScaling, inverse_frequencies

__all__ = ["Alibi", "Positions", "RopeScaling", "Rotary", "RotaryAlibi", "alibi_slopes", "inverse_frequencies"]


class Positions(Protocol):
    """How an attention mixer learns where its queries and keys stand."""

    def rotate(self, q: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """q (B, T, H, d) and the new keys k (B, T, G, d), both at the layout's query places -> the same shapes."""
        ...

    def slopes(self, heads: int, device: torch.device) -> Tensor | None:
        """(H,) float32: how much a head's score falls with each place between query and key; or None."""
        ...

    def shift(self, k: Tensor, by: Tensor) -> Tensor:
        """Keys (B, S, G, d) or (B, S, d) that `rotate` has turned, as if they stood `by` (B,) places further on."""
        ...


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): pairs of each head turn by position * frequency_i.

    `pairs` says which numbers form pair i: "halves" (i, i + dim/2) (GPT-NeoX, Llama) or "adjacent" (2i, 2i + 1) (GPT-J,
    Cohere, DeepSeek).
    Without `sections` the position is the 1-D index. With `sections` = pairs per axis (t, h, w), summing to dim/2,
    pairs turn by the media position on their axis (M-RoPE, Qwen2-VL, arXiv 2409.12191): axis by axis in blocks, or,
    with `interleaved`, cycling t h w t h w ... while an axis has pairs left (Qwen3-VL), so that each axis spans all
    frequencies. Text has equal positions on all axes, so for text all forms are the 1-D one.
    The first `fraction` of each head turns; the rest is left alone.
    """

    theta: float = 10_000.0
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    fraction: float = 1.0
    scaling: RopeScaling | None = None
    pairs: Literal["halves", "adjacent"] = "halves"

    def axes(self, pairs: int) -> list[int]:
        """The axis (0 t, 1 h, 2 w) that each of `pairs` pairs follows."""
        assert self.sections is not None
        if sum(self.sections) != pairs:
            raise ValueError(f"Rotary.sections {self.sections} must sum to half the rotated head width, {pairs}")
        if not self.interleaved:
            return [axis for axis, size in enumerate(self.sections) for _ in range(size)]
        left, axes = list(self.sections), []
        while len(axes) < pairs:
            for axis in range(3):
                if left[axis]:
                    left[axis] -= 1
                    axes.append(axis)
        return axes

    def rotated(self, head_dim: int) -> int:
        """How many of a head's numbers turn. Raises ValueError if they do not form pairs."""
        dim = int(head_dim * self.fraction)
        if dim % 2 or not 0 < dim <= head_dim:
            raise ValueError(
                f"Rotary.fraction {self.fraction} of head width {head_dim} is {dim} numbers: not a positive even number"
            )
        return dim

    def tables(self, layout: Layout, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, T, 1, rotated dim / 2) float32, for the layout's queries; made once a forward pass."""

        def make() -> tuple[Tensor, Tensor]:
            dim, device = self.rotated(head_dim), layout.positions.device
            scale = 1.0
            frequencies = inverse_frequencies(dim, self.theta, device)
            if self.scaling is not None:
                frequencies, scale = self.scaling.apply(dim, self.theta, device)
                if (long := self.scaling.long_frequencies(dim, self.theta, device)) is not None:
                    is_long = layout.document_lengths() > self.scaling.original_length  # (B, T)
                    frequencies = torch.where(is_long[..., None], long, frequencies)
            if self.sections is None:
                places = layout.queries.index[..., None].float()
            else:  # not by a tensor of axes, which would have to travel to the device
                places = torch.stack([layout.positions[..., axis] for axis in self.axes(dim // 2)], -1).float()
            angles = (places * frequencies)[:, :, None]
            return angles.cos() * scale, angles.sin() * scale

        return layout.remember(("rotary", self, head_dim), make)

    def turn(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, T, H, head_dim) -> the same, turned."""
        cos, sin = (table.to(x.dtype) for table in self.tables(layout, x.shape[-1]))
        return self._turn(x, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Turn.apply(x, cos, sin, self.pairs)  # type: ignore[no-any-return]
        turning, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
        if self.pairs == "halves":
            a, b = turning.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = turning[..., ::2], turning[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def shift(self, k: Tensor, by: Tensor) -> Tensor:
        """Keys (B, S, G, d) or (B, S, d), turned already, turned on by `by` (B,) places, on every axis.

        Raises ValueError for frequencies that switch with the length (longrope).
        """
        if self.switches_at is not None:
            raise ValueError("keys cannot be moved on: LongRoPE turns them by frequencies that depend on the length")
        dim = self.rotated(k.shape[-1])
        frequencies = inverse_frequencies(dim, self.theta, k.device)
        if self.scaling is not None:  # the scale of cos and sin is in the keys already
            frequencies, _ = self.scaling.apply(dim, self.theta, k.device)
        angles = by.float()[:, None] * frequencies
        angles = angles.view(len(by), *[1] * (k.ndim - 2), -1)
        return self._turn(k, angles.cos().to(k.dtype), angles.sin().to(k.dtype))

    @property
    def switches_at(self) -> int | None:
        """The length of a document beyond which all of its frequencies are others (longrope)."""
        return self.scaling.original_length if self.scaling is not None and self.scaling.kind == "longrope" else None

    def rotate(self, q: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        turned_q, turned_k = self.turn(torch.cat([q, k], 2), layout).split([q.shape[2], k.shape[2]], 2)
        return turned_q, turned_k

    def slopes(self, heads: int, device: torch.device) -> Tensor | None:
        return None


class _Turn(torch.autograd.Function):
    """Three passes each way, and nothing kept but the tables: the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return _turned(x, cos, sin, pairs, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.pairs, -1.0), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: str, way: float) -> Tensor:
    """The first numbers of each head, twice as many as cos has, turned by its angles, or, with `way` -1, back."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1]
    if rest := x.shape[-1] - 2 * half:
        out[..., -rest:] = x[..., -rest:]
    parts = (
        (slice(0, half), slice(half, 2 * half)) if pairs == "halves" else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    (a, b), (new_a, new_b) = ([whole[..., part] for part in parts] for whole in (x, out))
    torch.mul(a, cos, out=new_a).addcmul_(b, sin, value=-way)
    torch.mul(b, cos, out=new_b).addcmul_(a, sin, value=way)
    return out


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases: -slope_h * distance on the scores (Press et al. 2021, arXiv 2108.12409).

    `max_bias` is the exponent of the smallest slope, 2^-max_bias: 8 in the paper and BLOOM, MPT's alibi_bias_max.
    """

    max_bias: float = 8.0

    def rotate(self, q: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return q, k

    def shift(self, k: Tensor, by: Tensor) -> Tensor:
        return k  # the layout says where they stand

    def slopes(self, heads: int, device: torch.device) -> Tensor:
        return alibi_slopes(heads, self.max_bias, device)


@dataclass(frozen=True)
class RotaryAlibi:
    """The first `rotary_heads` query heads (and their key heads) turn, the rest have linear biases.

    The two kinds of head see place differently: rotary heads resolve order nearby, ALiBi heads reach beyond the trained
    length. The slopes are those of as many heads as have them.
    """

    rotary_heads: int
    rotary: Rotary = Rotary()
    alibi: Alibi = Alibi()

    @property
    def switches_at(self) -> int | None:
        return self.rotary.switches_at

    def rotate(self, q: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        group = q.shape[2] // k.shape[2]
        if self.rotary_heads % group or not 0 < self.rotary_heads < q.shape[2]:
            raise ValueError(
                f"RotaryAlibi.rotary_heads {self.rotary_heads} must lie between 0 and the {q.shape[2]} heads and be a "
                f"multiple of the {group} query heads that share a key head"
            )
        keys = self.rotary_heads // group
        turned_q, turned_k = self.rotary.rotate(q[:, :, : self.rotary_heads], k[:, :, :keys], layout)
        return torch.cat([turned_q, q[:, :, self.rotary_heads :]], 2), torch.cat([turned_k, k[:, :, keys:]], 2)

    def shift(self, k: Tensor, by: Tensor) -> Tensor:
        raise ValueError("keys cannot be moved on: which of RotaryAlibi's turn is known with the queries only")

    def slopes(self, heads: int, device: torch.device) -> Tensor:
        without = torch.zeros(self.rotary_heads, device=device)
        return torch.cat([without, self.alibi.slopes(heads - self.rotary_heads, device)])


def alibi_slopes(heads: int, max_bias: float = 8.0, device: torch.device | None = None) -> Tensor:
    """(H,) float32: 2^(-max_bias/n), 2^(-2 max_bias/n), ... for n a power of two; other counts go on with every other
    slope of the next power's (the paper's code). Made on the device, as rotary frequencies are."""
    power = 2 ** math.floor(math.log2(heads))
    number = torch.arange(heads, dtype=torch.float64, device=device)
    halves = torch.where(number < power, 2 * (number + 1), 2 * (number - power) + 1)
    return torch.exp2(halves * (-max_bias / (2 * power))).float()
