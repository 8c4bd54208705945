"""Expert weights and the dropless dispatch: tokens sorted by expert, one contiguous slice an expert.

Shape legend: `S` tokens, `K` experts each, `R` routed rows (at most S*K), `E` experts, `D` width, `F` expert hidden
width, `I` = 2F for gated experts, else F.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm.decoder.few_rows import few_rows, suits
from mm.decoder.ffn.activations import Activation, ClampedSwiglu, Gated, Plain
from mm.decoder.init import Init
from mm.types import Routing


class Experts(nn.Module):
    """E two-layer experts: x (S, D), Routing -> (S, D), the weighted sum of what each token's experts say.

    No token is dropped here; an expert with no token costs nothing, nor does padding (its result is zero).
    Weights: first (E, I, D), for gated experts the gate's rows before the values'; down (E, D, F); with `bias` also
    first_bias (E, I) and down_bias (E, D). The first matrix is called `gate_up` where it is gated, else `up`.
    """

    down_bias: nn.Parameter | None

    def __init__(self, width: int, hidden: int, num_experts: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.num_experts, self.activation = num_experts, activation
        self.first_name = "gate_up" if activation.gated else "up"
        inner = 2 * hidden if activation.gated else hidden
        self.register_parameter(self.first_name, nn.Parameter(torch.empty(num_experts, inner, width)))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))
        first_bias = nn.Parameter(torch.zeros(num_experts, inner)) if bias else None
        self.register_parameter(f"{self.first_name}_bias", first_bias)
        self.register_parameter("down_bias", nn.Parameter(torch.zeros(num_experts, width)) if bias else None)

    def initialise(self, init: Init) -> None:
        init.normal(self.get_parameter(self.first_name))
        init.normal(self.down, into_residual=True)
        if self.down_bias is not None:
            nn.init.zeros_(self.get_parameter(f"{self.first_name}_bias"))
            nn.init.zeros_(self.down_bias)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        first, first_bias = getattr(self, self.first_name), getattr(self, f"{self.first_name}_bias")
        if suits(x, first):
            return self._few(x, routing, first, first_bias)
        parts = (x, first, first_bias, self.down, self.down_bias, routing.weights)
        cast = (None if part is None else part.to(dtype) for part in parts)
        return _SortedSlices.apply(*cast, routing.indices, routing.taken(), self.activation)  # type: ignore[no-any-return]

    def _few(self, x: Tensor, routing: Routing, first: Tensor, first_bias: Tensor | None) -> Tensor:
        """The same for few tokens, as in decoding: no sorting, and only the chosen experts' weights are read."""
        tokens, chosen = routing.indices.shape
        expert = torch.where(routing.taken(), routing.indices, -1).flatten()
        before = few_rows(x.repeat_interleave(chosen, 0), first, expert)
        if first_bias is not None:
            before = before + first_bias[expert]
        inner = before.new_empty(len(before), self.down.shape[2])
        self.activation.forward(before, inner)
        out = few_rows(inner, self.down, expert)
        if self.down_bias is not None:
            out = (out + self.down_bias[expert]).masked_fill((expert < 0)[:, None], 0.0)
        return torch.bmm(routing.weights.to(x.dtype).unsqueeze(1), out.view(tokens, chosen, -1)).squeeze(1)


class SwigluExperts(Experts):
    """down(silu(gate(x)) * up(x)) (Mixtral, Qwen3-MoE, DeepSeek). Weights: gate_up (E, 2F, D), gate first; down."""

    gate_up: nn.Parameter

    def __init__(self, width: int, hidden: int, num_experts: int, bias: bool = False) -> None:
        super().__init__(width, hidden, num_experts, Gated("silu"), bias)


class GegluExperts(Experts):
    """down(gelu(gate(x)) * up(x)), the GELU exact or in its tanh form. Weights as SwigluExperts'."""

    gate_up: nn.Parameter

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        activation: Literal["gelu", "gelu_tanh"] = "gelu_tanh",
        bias: bool = False,
    ) -> None:
        super().__init__(width, hidden, num_experts, Gated(activation), bias)


class ClampedSwigluExperts(Experts):
    """gpt-oss: down((up(x) + 1) * gate(x) * sigmoid(alpha * gate(x))), gate and up clamped to `limit`, with biases."""

    gate_up: nn.Parameter

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        alpha: float = 1.702,
        limit: float = 7.0,
        bias: bool = True,
    ) -> None:
        super().__init__(width, hidden, num_experts, ClampedSwiglu(alpha, limit), bias)


class PlainExperts(Experts):
    """down(act(up(x))) (GShard, Switch; GELU experts). Weights: up (E, F, D); down (E, D, F); biases by default."""

    up: nn.Parameter

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        activation: Literal["gelu", "gelu_tanh", "relu", "relu2"] = "gelu_tanh",
        bias: bool = True,
    ) -> None:
        super().__init__(width, hidden, num_experts, Plain(activation), bias)


class _SortedSlices(torch.autograd.Function):
    """One autograd node for the whole dispatch: products write into slices of shared buffers, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        first_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        weights: Tensor,
        indices: Tensor,
        taken: Tensor,
        activation: Activation,
    ) -> Tensor:
        tokens, chosen = indices.shape
        experts = len(first)
        places = torch.where(taken, indices, experts).reshape(-1)  # what is not taken goes past the last expert
        counts = torch.bincount(places, minlength=experts + 1).tolist()[:experts]
        order = places.argsort(stable=True)[: sum(counts)]  # (R,) routed (token, choice) pairs, grouped by expert
        rows = x.index_select(0, order // chosen)
        before = rows.new_empty(len(order), first.shape[1])
        inner = rows.new_empty(len(order), down.shape[2])
        out = rows.new_empty(len(order), x.shape[1])
        for expert, part in _slices(counts):
            _linear(rows[part], first[expert], None if first_bias is None else first_bias[expert], before[part])
            activation.forward(before[part], inner[part])
            _linear(inner[part], down[expert], None if down_bias is None else down_bias[expert], out[part])
        back = torch.full_like(places, len(order))  # where each (token, choice) went; past the end: nowhere
        back[order] = torch.arange(len(order), device=order.device)
        ctx.save_for_backward(rows, before, inner, out, first, first_bias, down, down_bias, weights, order, back)
        ctx.counts, ctx.activation = counts, activation
        per_choice = _gather(out, back).view(tokens, chosen, x.shape[1])
        return torch.bmm(weights.unsqueeze(1), per_choice).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, before, inner, out, first, first_bias, down, down_bias, weights, order, back = ctx.saved_tensors
        tokens, chosen = weights.shape
        wants_x, wants_first, wants_first_bias, wants_down, wants_down_bias = ctx.needs_input_grad[:5]
        grad_rows = grad.index_select(0, order // chosen)
        grad_weights = _gather((grad_rows * out).sum(-1, keepdim=True), back).view(tokens, chosen)
        grad_out = grad_rows.mul_(weights.reshape(-1).index_select(0, order).unsqueeze(1))
        grad_before = torch.empty_like(before)
        grad_x = torch.empty_like(rows) if wants_x else None
        grad_first, grad_first_bias, grad_down, grad_down_bias = (
            torch.zeros_like(weight) if wanted else None  # frozen experts cost no product
            for weight, wanted in (
                (first, wants_first),
                (first_bias, wants_first_bias),
                (down, wants_down),
                (down_bias, wants_down_bias),
            )
        )
        for expert, part in _slices(ctx.counts):
            if grad_down is not None:
                torch.mm(grad_out[part].t(), inner[part], out=grad_down[expert])
            if grad_down_bias is not None:
                torch.sum(grad_out[part], 0, out=grad_down_bias[expert])
            ctx.activation.backward(before[part], grad_out[part] @ down[expert], grad_before[part])
            if grad_first is not None:
                torch.mm(grad_before[part].t(), rows[part], out=grad_first[expert])
            if grad_first_bias is not None:
                torch.sum(grad_before[part], 0, out=grad_first_bias[expert])
            if grad_x is not None:
                torch.mm(grad_before[part], first[expert], out=grad_x[part])
        grad_tokens = None if grad_x is None else _gather(grad_x, back).view(tokens, chosen, rows.shape[1]).sum(1)
        return grad_tokens, grad_first, grad_first_bias, grad_down, grad_down_bias, grad_weights, None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _gather(rows: Tensor, back: Tensor) -> Tensor:
    """rows[back], zero where `back` points past the last row."""
    if len(rows) == len(back):  # every choice was carried out, the usual case
        return rows.index_select(0, back)
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, back)


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its slice of the sorted rows) of every expert that has rows."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(start, start + count)))
        start += count
    return parts
