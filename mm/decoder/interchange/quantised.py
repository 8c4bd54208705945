"""Published number formats that checkpoints are stored in, as float32 on load: MXFP4 (gpt-oss), FP8 (DeepSeek-V3)."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.decoder.interchange.weights import Rule, Shape

MXFP4_BLOCK = 32
# E2M1, the sixteen numbers of four bits: sign, two bits of exponent, one of mantissa (OCP MX v1.0, section 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*_E2M1, *(-x for x in _E2M1))
_EXPONENT_BIAS = 127  # of E8M0, a scale that is a power of two alone (section 5.4.1)
_E8M0_NAN = 255


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (..., N, 16) uint8, two numbers a byte, low bits first; scales (..., N) uint8 -> (..., 32 N) float32.

    Open Compute Project, Microscaling Formats v1.0 (2023). Raises ValueError for tensors of other types or shapes.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"MXFP4 blocks and scales are uint8, not {blocks.dtype} and {scales.dtype}")
    if blocks.shape != (*scales.shape, MXFP4_BLOCK // 2):
        raise ValueError(f"MXFP4 blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}")
    numbers = torch.tensor(FP4, device=blocks.device)
    pairs = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-2)
    factors = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - _EXPONENT_BIAS)
    factors = factors.masked_fill(scales == _E8M0_NAN, torch.nan)
    return (numbers[pairs.int()] * factors[..., None]).flatten(-2)


def dequantise_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight (M, N) float8, scale (ceil(M / block), ceil(N / block)) float32 -> (M, N) float32: one factor a block."""
    rows, columns = weight.shape
    factors = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * factors


def with_fp8(rule: Rule, block: tuple[int, int], suffix: str = "weight_scale_inv") -> Rule:
    """A rule whose matrices are stored as FP8, each with a tensor of factors beside it (DeepSeek-V3, section 3.3)."""
    count = len(rule.theirs)
    scales = tuple(name.removesuffix("weight") + suffix for name in rule.theirs)

    def load(parts: list[Tensor]) -> list[Tensor]:
        pairs = zip(parts[:count], parts[count:], strict=True)
        return rule.load([dequantise_fp8(weight, scale, block) for weight, scale in pairs])

    def shapes(ours: list[Shape]) -> list[Shape]:
        theirs = rule.their_shapes(ours)
        return [*theirs, *(tuple(-(-size // b) for size, b in zip(shape, block, strict=True)) for shape in theirs)]

    return Rule(rule.ours, (*rule.theirs, *scales), load, None, shapes)
