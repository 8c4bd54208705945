"""Normalisation along the last axis: RMSNorm (with Gemma's offset) and LayerNorm (with or without a bias)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x (..., width) -> x / sqrt(mean(x^2) + eps) * (offset + weight) (Zhang and Sennrich 2019, arXiv 1910.07467).

    `offset` 1 is Gemma's form, whose stored weights stand around 0; 0 is everyone else's. The result starts unscaled
    either way. Maths in float32, result in x's dtype.
    """

    def __init__(self, width: int, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x.float(), weight.float(), self.eps).to(x.dtype)  # type: ignore[no-any-return]
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"


class _RMSNorm(torch.autograd.Function):
    """torch's on a CPU is a dozen small steps: this goes half as often over memory. x (..., width), all float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        both, rows = (grad * x).reshape(-1, width), scale.reshape(-1)
        grad_weight = rows @ both if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            along = (both @ weight).mul_(rows.pow(3)).div_(-width).view(scale.shape)
            grad_x = (grad * weight).mul_(scale).addcmul_(x, along)
        return grad_x, grad_weight, None


class LayerNorm(nn.Module):
    """x (..., width) -> (x - mean) / sqrt(variance + eps) * weight [+ bias] (Ba et al. 2016, arXiv 1607.06450).

    Maths in float32, result in x's dtype.
    """

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


class HeadNorm(nn.Module):
    """LayerNorm of each head of x (B, T, heads, head_dim), with a weight for each head and no bias (Cohere)."""

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return (F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps) * self.weight.float()).to(x.dtype)


class FullNorm(RMSNorm):
    """RMSNorm over all heads of x (B, T, heads, head_dim) together, heads * head_dim wide (OLMoE, OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)
