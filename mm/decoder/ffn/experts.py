"""Experts' weights, and what they say of the tokens that a router sends them.

Shape legend: `S` tokens, `K` experts each, `E` experts, `D` width, `F` expert hidden width, `I` = 2F for gated experts,
else F.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.decoder.few_rows import few_rows, suits
from mm.decoder.ffn.activations import Activation, ClampedSwiglu, Gated, Plain
from mm.decoder.ffn.dispatch import Dispatch, check, groups, run
from mm.decoder.init import Init
from mm.types import Routing


class Experts(nn.Module):
    """E two-layer experts: x (S, D), Routing -> (S, D), the weighted sum of what each token's experts say.

    No token is dropped here; an expert with no token costs nothing, nor does padding (its result is zero).
    Weights: first (E, I, D), for gated experts the gate's rows before the values'; down (E, D, F); with `bias` also
    first_bias (E, I) and down_bias (E, D). The first matrix is called `gate_up` where it is gated, else `up`.

    `dispatch` says how products are made of tokens that go to different experts: "slices" one by one, "grouped" all at
    once (torch's grouped_mm, which asks the host nothing), "auto" grouped on a GPU of compute capability 9 or later in
    bfloat16 and slices elsewhere. The result is the same but for the order of sums.
    """

    down_bias: nn.Parameter | None
    dispatch: Dispatch

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        activation: Activation,
        bias: bool,
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__()
        check(dispatch)
        self.num_experts, self.activation, self.dispatch = num_experts, activation, dispatch
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
        return run(self.dispatch, *cast, routing.indices, routing.taken(), self.activation)  # type: ignore[arg-type]

    def groups(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether products there, in that dtype, are grouped: the host then waits for no token's expert."""
        return groups(self.dispatch, device, dtype, self.get_parameter(self.first_name), self.down)

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

    def __init__(
        self, width: int, hidden: int, num_experts: int, bias: bool = False, dispatch: Dispatch = "auto"
    ) -> None:
        super().__init__(width, hidden, num_experts, Gated("silu"), bias, dispatch)


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
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__(width, hidden, num_experts, Gated(activation), bias, dispatch)


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
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__(width, hidden, num_experts, ClampedSwiglu(alpha, limit), bias, dispatch)


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
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__(width, hidden, num_experts, Plain(activation), bias, dispatch)
