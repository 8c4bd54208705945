"""What stands between an expert's two matrices, forward and backward, written into buffers that the dispatch owns.

Shape legend: `R` rows, `F` hidden width, `I` what the first matrix gives: 2F (gate and values) where gated, else F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

_aten: Any = torch.ops.aten


class Activation(Protocol):
    """(R, I) -> (R, F). Both methods write into `out` and may overwrite no other argument but `grad`."""

    gated: bool

    def forward(self, x: Tensor, out: Tensor) -> None:
        """x (R, I), out (R, F)."""
        ...

    def backward(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """x as in forward, grad (R, F) of the result; out (R, I) takes the gradient of x."""
        ...


@dataclass(frozen=True)
class Plain:
    """GELU (exact or tanh form), ReLU or squared ReLU (Primer, arXiv 2109.08668) of each number."""

    kind: Literal["gelu", "gelu_tanh", "relu", "relu2"] = "gelu_tanh"
    gated = False

    def forward(self, x: Tensor, out: Tensor) -> None:
        if self.kind.startswith("gelu"):
            torch.ops.aten.gelu.out(x, approximate="tanh" if self.kind == "gelu_tanh" else "none", out=out)
            return
        torch.clamp(x, min=0, out=out)
        if self.kind == "relu2":
            out.square_()

    def backward(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        if self.kind.startswith("gelu"):
            out.copy_(_aten.gelu_backward(grad, x, approximate="tanh" if self.kind == "gelu_tanh" else "none"))
        elif self.kind == "relu":
            torch.mul(grad, x > 0, out=out)
        else:
            torch.mul(grad, x.clamp(min=0), out=out).mul_(2)


@dataclass(frozen=True)
class Gated:
    """act(gate) * up, the gate in the first F numbers (Shazeer 2020, arXiv 2002.05202): SwiGLU; GeGLU with a GELU."""

    kind: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated = True

    def forward(self, x: Tensor, out: Tensor) -> None:
        gate, up = x.chunk(2, -1)
        self._act(gate, out).mul_(up)

    def backward(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        gate, up = x.chunk(2, -1)
        grad_gate, grad_up = out.chunk(2, -1)
        self._act(gate, grad_up).mul_(grad)
        grad_act = grad.mul_(up)
        if self.kind == "silu":
            _aten.silu_backward.grad_input(grad_act, gate, grad_input=grad_gate)
        else:
            _aten.gelu_backward.grad_input(grad_act, gate, approximate=self._form, grad_input=grad_gate)

    def _act(self, gate: Tensor, out: Tensor) -> Tensor:
        if self.kind == "silu":
            return _aten.silu.out(gate, out=out)
        return _aten.gelu.out(gate, approximate=self._form, out=out)

    @property
    def _form(self) -> str:
        return "tanh" if self.kind == "gelu_tanh" else "none"


@dataclass(frozen=True)
class ClampedSwiglu:
    """(up + 1) * gate * sigmoid(alpha * gate), gate <= limit and |up| <= limit (gpt-oss, OpenAI 2025).

    Where a number is clamped, its gradient is zero.
    """

    alpha: float = 1.702
    limit: float = 7.0
    gated = True

    def forward(self, x: Tensor, out: Tensor) -> None:
        gate, up = x.chunk(2, -1)
        gate = gate.clamp(max=self.limit)
        torch.mul(gate * torch.sigmoid(gate * self.alpha), up.clamp(-self.limit, self.limit).add_(1), out=out)

    def backward(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        gate, up = x.chunk(2, -1)
        grad_gate, grad_up = out.chunk(2, -1)
        free_gate, free_up = gate <= self.limit, (up >= -self.limit) & (up <= self.limit)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        share = torch.sigmoid(gate * self.alpha)
        torch.mul(grad, gate * share, out=grad_up).mul_(free_up)
        slope = share * (1 + self.alpha * gate * (1 - share))  # of gate * sigmoid(alpha * gate)
        torch.mul(grad, (up + 1) * slope, out=grad_gate).mul_(free_gate)
