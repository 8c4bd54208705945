"""The dense feed-forward parts: gated (SwiGLU, GeGLU) and plain."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class GatedFFN(nn.Module):
    """down(act(gate(x)) * up(x)), x (..., width) (Shazeer 2020, arXiv 2002.05202); SiLU makes it SwiGLU, GELU GeGLU."""

    def __init__(
        self, width: int, hidden: int, activation: Literal["silu", "gelu"] = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = F.silu if activation == "silu" else F.gelu
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate) * up)


class PlainFFN(nn.Module):
    """down(act(up(x))), x (..., width): GELU (tanh form, as GPT-2) or ReLU, with biases by default."""

    def __init__(
        self, width: int, hidden: int, activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh", bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = {"gelu_tanh": nn.GELU("tanh"), "gelu": nn.GELU(), "relu": nn.ReLU()}[activation]
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
