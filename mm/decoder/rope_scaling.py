"""How rotary frequencies stretch beyond the length that a model was first trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained length.

    linear    divides every frequency by `factor` (Chen et al. 2023, arXiv 2306.15595)
    ntk       raises the base instead, theta * factor^(d / (d - 2)) (bloc97, 2023)
    yarn      interpolates low frequencies only and scales attention (Peng et al. 2023, arXiv 2309.00071); the
              boundaries are where a pair makes `beta_fast` and `beta_slow` turns, rounded outwards if `truncate`
    llama3    as Llama 3.1: keeps high, divides low, blends between (Meta, 2024)
    longrope  divides frequency i by `short_factor[i]`, or by `long_factor[i]` in documents that are longer than
              `original_length`, and scales attention (Ding et al. 2024, arXiv 2402.13753; Phi-3)

    `original_length` is the length that the model was trained with (yarn, llama3 and longrope need it). cos and sin are
    multiplied by `attention_factor`; None is the published value: 0.1 ln(factor) + 1 for yarn, or with `mscale` and
    `mscale_all_dim` the ratio (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1) (DeepSeek-V2);
    sqrt(1 + ln(factor) / ln(original_length)) for longrope, `factor` being the whole stretch of the context.

    Raises ValueError naming the field.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3", "longrope"]
    factor: float
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"RopeScaling.factor must be positive, not {self.factor}")
        if self.original_length < 1:
            raise ValueError(f"RopeScaling.original_length must be positive, not {self.original_length}")
        for name in ("short_factor", "long_factor"):
            value = getattr(self, name)
            if (value is None) == (self.kind == "longrope"):
                raise ValueError(f"RopeScaling.{name} is needed by longrope, and by longrope only; kind is {self.kind}")
            if value is not None:
                object.__setattr__(self, name, tuple(value))  # a list from a config: the scheme must be hashable

    def apply(self, dim: int, theta: float, device: torch.device | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies (dim/2,) float32 and the factor that multiplies cos and sin.

        For longrope these are the ones of short documents.
        """
        plain = inverse_frequencies(dim, theta, device)
        if self.kind == "linear":
            return plain / self.factor, 1.0
        if self.kind == "ntk":
            return inverse_frequencies(dim, theta * self.factor ** (dim / (dim - 2)), device), 1.0
        if self.kind == "yarn":
            return self._yarn(plain, dim, theta), self._yarn_attention()
        if self.kind == "longrope":
            return self._divided("short_factor", plain), self._longrope_attention()
        return self._llama3(plain), 1.0

    def long_frequencies(self, dim: int, theta: float, device: torch.device | None = None) -> Tensor | None:
        """(dim/2,) float32 for documents longer than `original_length`, where these differ (longrope)."""
        return (
            self._divided("long_factor", inverse_frequencies(dim, theta, device)) if self.kind == "longrope" else None
        )

    def _divided(self, name: str, plain: Tensor) -> Tensor:
        factors = getattr(self, name)
        if len(factors) != len(plain):
            raise ValueError(f"RopeScaling.{name} has {len(factors)} numbers; the rotated pairs are {len(plain)}")
        return plain / torch.tensor(factors).to(plain.device, non_blocking=True)

    def _longrope_attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length)) if self.factor > 1 else 1.0

    def _yarn(self, plain: Tensor, dim: int, theta: float) -> Tensor:
        def pair_of(turns: float) -> float:
            """The pair, as a real number, that turns this often over the original length (equation 17's inverse)."""
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2, device=plain.device).float() - low) / (high - low or 0.001)).clamp(0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    def _yarn_attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)

    def _llama3(self, plain: Tensor) -> Tensor:
        wavelength = 2 * math.pi / plain
        span = self.high_freq_factor - self.low_freq_factor
        blend = ((self.original_length / wavelength - self.low_freq_factor) / span).clamp(0, 1)
        return (1 - blend) * plain / self.factor + blend * plain


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1, or 1 without stretch (YaRN, section 3.4; DeepSeek-V2's `mscale`)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, float32 (Su et al. 2021, arXiv 2104.09864, section 3.2.2).

    Made where it is used: to copy it to a GPU would make the host wait, and no CUDA graph could hold it.
    """
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
