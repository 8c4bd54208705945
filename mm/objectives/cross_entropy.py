"""Cross-entropy from hidden states: the logits of a long sequence over a large vocabulary are never held.

Logits of some rows at a time, whose gradients are taken at once, as in Cut Cross-Entropy (Wijmans et al. 2025, arXiv
2411.09009) and Liger Kernel (Hsu et al. 2024, arXiv 2410.10989). Shape legend: `N` positions, `D` width, `V` words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.decoder.embedding import Head, Projection
from mm.decoder.many_rows import onednn_if
from mm.decoder.reused import empty

# Logits held at a time, in float32; their gradient takes their place. As many as caches hold, but not so few rows that
# adding up the gradients of a large matrix takes longer than making them.
CHUNK, LEAST_ROWS = {"cpu": 1 << 22, "cuda": 1 << 24}, 128


def cross_entropy(head: Projection, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log p(label) over hidden (N, D) and labels (N,) int64, float32; how many labels were the likeliest.

    The gradient is that of the plain loss; under autocast, that of a loss whose products are made in its dtype. Where
    the head's matrix is trained it takes twice that matrix in float32, in the backward pass: its gradient as it was
    made, and scaled.
    """
    weight, bias = head.matrix.weight, head.matrix.bias
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    wanted = torch.is_grad_enabled()
    return _CrossEntropy.apply(hidden, weight, bias, labels, head.options, dtype, wanted)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, where the logits are, and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: Head,
        dtype: torch.dtype,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = (wanted and needed for needed in ctx.needs_input_grad[:3])
        wants_any = wants_hidden or wants_weight or wants_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        grad_hidden = empty(hidden, *hidden.shape) if wants_hidden else None
        # Sums over all chunks, so in float32 whatever the products are made in.
        sums = torch.empty(0, dtype=torch.float32, device=hidden.device)
        grad_weight = empty(sums, *weight.shape) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        loss = torch.zeros((), device=hidden.device)
        right = torch.zeros((), dtype=torch.long, device=hidden.device)
        rows = max(LEAST_ROWS, CHUNK["cpu" if hidden.is_cpu else "cuda"] // len(weight))
        products = min(rows, len(labels)) * weight.numel()
        with torch.autocast(hidden.device.type, enabled=False), onednn_if(hidden, products):
            for start in range(0, len(labels), rows):
                part, label = hidden[start : start + rows], labels[start : start + rows]
                term, count, grad = _chunk(part, weight, bias, label, options, wants_any)
                loss += term
                right += count
                if grad is None:
                    continue
                if grad_hidden is not None:
                    torch.mm(grad, weight, out=grad_hidden[start : start + rows])
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), part, first=not start)
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
        if grad_weight is not None and not len(labels):
            grad_weight.zero_()
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Scaled anew: a caller that keeps the graph may come again.
        grads = (
            None if part is None else torch.mul(part, grad, out=empty(part, *part.shape)).to(dtype)
            for part, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: Head, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of some rows, how many were right, and the gradient of what the matrix gives, in hidden's dtype.

    Logits, probabilities and gradient are one buffer after another: what takes time here is memory.
    """
    raw = empty(hidden, len(hidden), len(weight))
    if bias is None:
        torch.mm(hidden, weight.t(), out=raw)
    else:
        torch.addmm(bias, hidden, weight.t(), out=raw)
    exact = raw if raw.dtype == torch.float32 else empty(raw.new_empty(0, dtype=torch.float32), *raw.shape).copy_(raw)
    with torch.set_grad_enabled(wanted):
        exact.requires_grad_(wanted)
        logits = options.finish(exact)
    scores = logits.detach()
    label = labels[:, None]
    top, likeliest = scores.max(-1, keepdim=True)
    said = scores.gather(1, label)
    scores.sub_(top).exp_()
    sums = scores.sum(-1, keepdim=True)
    loss, right = (sums.log() + top - said).sum(), (likeliest == label).sum()
    if not wanted:
        return loss, right, None
    scores.div_(sums)
    scores.scatter_add_(1, label, torch.full_like(said, -1.0))
    grad = torch.autograd.grad(logits, exact, scores)[0]
    return loss, right, grad if raw.dtype == torch.float32 else raw.copy_(grad)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total float32 += left @ right, or = where it is the first."""
    if left.dtype == torch.float32:
        total.addmm_(left, right, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(torch.mm(left, right, out=empty(left, *total.shape)))
    else:
        total.add_(torch.mm(left, right, out=empty(left, *total.shape)))
