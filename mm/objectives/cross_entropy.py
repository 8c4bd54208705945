"""Cross-entropy from hidden states: the logits of a long sequence over a large vocabulary are never held.

Logits of some rows at a time, whose gradients are taken at once, as in Cut Cross-Entropy (Wijmans et al. 2025, arXiv
2411.09009) and Liger Kernel (Hsu et al. 2024, arXiv 2410.10989). Shape legend: `N` positions, `D` width, `V` words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.decoder.embedding import Head, Projection

CHUNK = 1 << 24  # logits held at a time, 64 MB in float32: their gradient and what lies between take as much again


def cross_entropy(head: Projection, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log p(label) over hidden (N, D) and labels (N,) int64, float32; how many labels were the likeliest.

    The gradient is that of the plain loss. Where the head's matrix is trained it takes twice that matrix in float32, in
    the backward pass: its gradient as it was made, and scaled.
    """
    weight, bias = head.matrix.weight, head.matrix.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    parts = (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
    return _CrossEntropy.apply(*parts, labels, head.options, wanted)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, where the logits are, and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: Head, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        wants = [wanted and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        # Sums over all chunks, so in float32 whatever the products are made in.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None
        loss = torch.zeros((), device=hidden.device)
        right = torch.zeros((), dtype=torch.long, device=hidden.device)
        rows = max(1, CHUNK // len(weight))
        for start in range(0, len(labels), rows):
            part, label = hidden[start : start + rows], labels[start : start + rows]
            with torch.autocast(hidden.device.type, enabled=False):
                raw = F.linear(part, weight, bias)
                term, count, grad = _chunk(raw, label, options, wanted)
                loss += term
                right += count
                if grad is None:
                    continue
                if grad_hidden is not None:
                    torch.mm(grad, weight, out=grad_hidden[start : start + rows])
                if grad_weight is not None:
                    if grad.dtype == torch.float32:
                        grad_weight.addmm_(grad.t(), part)
                    else:
                        grad_weight += grad.t() @ part
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Scaled anew: a caller that keeps the graph may come again.
        grads = (
            None if part is None else (part * grad).to(dtype) for part, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None


def _chunk(raw: Tensor, labels: Tensor, options: Head, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of some rows of raw logits, how many were right, and the gradient of the raw logits."""
    with torch.set_grad_enabled(wanted):
        raw = raw.detach().requires_grad_(wanted)
        logits = options.finish(raw)
        loss = F.cross_entropy(logits, labels, reduction="sum")
    right = (logits.detach().argmax(-1) == labels).sum()
    return loss.detach(), right, torch.autograd.grad(loss, raw)[0] if wanted else None
