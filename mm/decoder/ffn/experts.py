"""Expert weights and the dropless dispatch: tokens sorted by expert, one contiguous slice an expert.

Shape legend: `S` tokens, `K` experts each, `R` = S*K routed rows, `E` experts, `D` width, `F` expert hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.types import Routing


class SwigluExperts(nn.Module):
    """E SwiGLU experts: x (S, D), Routing -> (S, D), the weighted sum of each token's chosen experts.

    No token is dropped; an expert with no token costs nothing. Weights: gate_up (E, 2F, D), gate first; down (E, D, F).
    """

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        return _SortedSlices.apply(x.to(dtype), gate_up, down, routing.weights.to(dtype), routing.indices)  # type: ignore[no-any-return]


class _SortedSlices(torch.autograd.Function):
    """One autograd node for the whole dispatch: products write into slices of shared buffers, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        tokens, chosen = indices.shape
        hidden = down.shape[2]
        order = indices.reshape(-1).argsort(stable=True)  # (R,) routed rows, grouped by expert
        counts = torch.bincount(indices.reshape(-1), minlength=gate_up.shape[0]).tolist()
        rows = x.index_select(0, order // chosen)
        both = rows.new_empty(len(order), 2 * hidden)
        inner = rows.new_empty(len(order), hidden)
        out = rows.new_empty(len(order), x.shape[1])
        for expert, part in _slices(counts):
            torch.mm(rows[part], gate_up[expert].t(), out=both[part])
            torch.mul(F.silu(both[part, :hidden]), both[part, hidden:], out=inner[part])
            torch.mm(inner[part], down[expert].t(), out=out[part])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)  # where each (token, choice) went
        ctx.save_for_backward(rows, both, inner, out, gate_up, down, weights, order, back)
        ctx.counts = counts
        per_choice = out.index_select(0, back).view(tokens, chosen, x.shape[1])
        return torch.bmm(weights.unsqueeze(1), per_choice).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, both, inner, out, gate_up, down, weights, order, back = ctx.saved_tensors
        tokens, chosen = weights.shape
        hidden = down.shape[2]
        grad_rows = grad.index_select(0, order // chosen)
        grad_weights = (grad_rows * out).sum(-1).index_select(0, back).view(tokens, chosen)
        grad_out = grad_rows.mul_(weights.reshape(-1).index_select(0, order).unsqueeze(1))
        grad_both, grad_x = torch.empty_like(both), torch.empty_like(rows)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for expert, part in _slices(ctx.counts):
            gate, up = both[part, :hidden], both[part, hidden:]
            grad_inner = grad_out[part] @ down[expert]
            torch.mm(grad_out[part].t(), inner[part], out=grad_down[expert])
            torch.mul(grad_inner, F.silu(gate), out=grad_both[part, hidden:])
            grad_both[part, :hidden] = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
            torch.mm(grad_both[part].t(), rows[part], out=grad_gate_up[expert])
            torch.mm(grad_both[part], gate_up[expert], out=grad_x[part])
        grad_tokens = grad_x.index_select(0, back).view(tokens, chosen, rows.shape[1]).sum(1)
        return grad_tokens, grad_gate_up, grad_down, grad_weights, None


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its slice of the sorted rows) of every expert that has rows."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(start, start + count)))
        start += count
    return parts
