"""Positions for attention: rotary over one axis or several, with the published scalings, and ALiBi.

A position scheme belongs to a mixer and holds no parameters. Rotary schemes turn queries and keys; ALiBi biases scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm.decoder.layout import Layout


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained length.

    linear   divides every frequency by `factor` (Chen et al. 2023, arXiv 2306.15595)
    ntk      raises the base instead, theta * factor^(d / (d - 2)) (bloc97, 2023)
    yarn     interpolates low frequencies only and scales attention (Peng et al. 2023, arXiv 2309.00071)
    llama3   as Llama 3.1: keeps high, divides low, blends between (Meta, 2024)
    `original_length` is the length that the model was trained with (yarn and llama3 need it).
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None

    def apply(self, dim: int, theta: float) -> tuple[Tensor, float]:
        """Inverse frequencies (dim/2,) float32 and the factor that multiplies cos and sin."""
        plain = inverse_frequencies(dim, theta)
        if self.kind == "linear":
            return plain / self.factor, 1.0
        if self.kind == "ntk":
            return inverse_frequencies(dim, theta * self.factor ** (dim / (dim - 2))), 1.0
        if self.kind == "yarn":
            return self._yarn(plain, dim, theta)
        return self._llama3(plain), 1.0

    def _yarn(self, plain: Tensor, dim: int, theta: float) -> tuple[Tensor, float]:
        def turns_to_dim(turns: float) -> float:
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(turns_to_dim(self.beta_fast)), 0)
        high = min(math.ceil(turns_to_dim(self.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return plain / self.factor * ramp + plain * (1 - ramp), scale

    def _llama3(self, plain: Tensor) -> Tensor:
        wavelength = 2 * math.pi / plain
        span = self.high_freq_factor - self.low_freq_factor
        blend = ((self.original_length / wavelength - self.low_freq_factor) / span).clamp(0, 1)
        return (1 - blend) * plain / self.factor + blend * plain


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, float32 (Su et al. 2021, arXiv 2104.09864, section 3.2.2)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: pairs (i, i + dim/2) of each head turn by position * frequency_i.

    Without `sections` the position is the 1-D index. With `sections` = pairs per axis (t, h, w), summing to dim/2,
    pairs turn by the media position on their axis (M-RoPE, Qwen2-VL, arXiv 2409.12191): axis by axis in blocks, or,
    with `interleaved`, cycling t h w t h w ... while an axis has pairs left (Qwen3-VL), so that each axis spans all
    frequencies. Text has equal positions on all axes, so for text all forms are the 1-D one.
    `fraction` of each head turns; the rest is left alone.
    """

    theta: float = 10_000.0
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    fraction: float = 1.0
    scaling: RopeScaling | None = None

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

    def tables(self, layout: Layout, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, T, 1, rotated dim / 2) float32, for the layout's queries; made once a forward pass."""

        def make() -> tuple[Tensor, Tensor]:
            dim = int(head_dim * self.fraction)
            frequencies, scale = (
                self.scaling.apply(dim, self.theta) if self.scaling else (inverse_frequencies(dim, self.theta), 1.0)
            )
            device = layout.positions.device
            if self.sections is None:
                places = layout.queries.index[..., None].float()
            else:
                places = layout.positions[..., torch.tensor(self.axes(dim // 2), device=device)].float()
            angles = (places * frequencies.to(device))[:, :, None]
            return angles.cos() * scale, angles.sin() * scale

        return layout.remember(("rotary", self, head_dim), make)

    def turn(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, T, H, head_dim) -> the same, turned."""
        cos, sin = (table.to(x.dtype) for table in self.tables(layout, x.shape[-1]))
        pairs = cos.shape[-1]
        a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
        turned = [a * cos - b * sin, b * cos + a * sin]
        return torch.cat([*turned, rest] if rest.shape[-1] else turned, -1)


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases: -slope_h * distance on the scores (Press et al. 2021, arXiv 2108.12409)."""

    def bias(self, layout: Layout, heads: int) -> Tensor:
        """(B, H, T, S) float32 bias, -inf where a query does not see a key."""

        def make() -> Tensor:
            distance = layout.queries.index[:, :, None] - layout.keys.index[:, None, :]
            slopes = torch.tensor(alibi_slopes(heads), device=distance.device)
            bias = -slopes[None, :, None, None] * distance[:, None].float()
            return bias.masked_fill(~layout.mask(), float("-inf"))

        return layout.remember(("alibi", heads), make)


def alibi_slopes(heads: int) -> Seq[float]:
    """2^(-8/n), 2^(-16/n), ... for n a power of two; other counts interleave the next power's (the paper's code)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
