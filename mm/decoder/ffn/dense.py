"""The dense feed-forward parts: gated (SwiGLU, GeGLU), gated and clamped (gpt-oss), and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.few_rows import Linear
from mm.decoder.init import Init

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,  # with the error function
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # Hendrycks and Gimpel 2016, arXiv 1606.08415 (GPT-2, Gemma)
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668 (Primer)
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name. Raises ValueError naming the choices."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), gate at most `limit`, up within +-`limit` (OpenAI 2025, gpt-oss)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + 1)


class GatedFFN(nn.Module):
    """down(act(gate(x)) * up(x)), x (..., width) (Shazeer 2020, arXiv 2002.05202).

    SiLU makes it SwiGLU, GELU (either form) GeGLU, ReLU ReGLU. Weight: gate_up (2 * hidden, width), gate first.
    """

    def __init__(self, width: int, hidden: int, activation: Activation = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation = _activation(activation)
        self.gate_up = Linear(width, 2 * hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias)

    def initialise(self, init: Init) -> None:
        init.normal(self.down.weight, into_residual=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate) * up)

    def kept_numbers(self) -> tuple[int, int]:
        """What the backward pass keeps of one position beyond the matrices' inputs and outputs: numbers in the
        activations' dtype (the activated gate) and in float32."""
        return self.down.in_features, 0


class ClampedFFN(nn.Module):
    """down(clamped_swiglu(gate(x), up(x))), x (..., width): gpt-oss's expert as a dense part.

    Weight: gate_up (2 * hidden, width), gate first (gpt-oss itself stores the two interleaved).
    """

    def __init__(self, width: int, hidden: int, alpha: float = 1.702, limit: float = 7.0, bias: bool = True) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit
        self.gate_up = Linear(width, 2 * hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias)

    def initialise(self, init: Init) -> None:
        init.normal(self.down.weight, into_residual=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(clamped_swiglu(gate, up, self.alpha, self.limit))


class PlainFFN(nn.Module):
    """down(act(up(x))), x (..., width): by default GPT-2's, GELU in its tanh form and biases."""

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu_tanh", bias: bool = True) -> None:
        super().__init__()
        self.activation = _activation(activation)
        self.up = Linear(width, hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias)

    def initialise(self, init: Init) -> None:
        init.normal(self.down.weight, into_residual=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


_activation = activation  # the constructors have an argument of that name
