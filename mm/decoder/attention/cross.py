"""Gated cross-attention to media beside the sequence (Flamingo, arXiv 2204.14198, section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.few_rows import Linear
from mm.decoder.layout import Layout


class GatedCrossAttention(nn.Module):
    """x (B, T, width) -> x + tanh(gate) * attention(x, media): the gate starts at zero, so the text path is unchanged.

    A position that sees no media gets exactly zero added. Text attends to media of its own document and branch that
    come at or before it; keys and values come ready-made from a cross-attention bridge, in the decoder's width.
    """

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"GatedCrossAttention: width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.q = Linear(width, width, bias=False)
        self.kv = Linear(width, 2 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.cross is None:
            return x
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(layout.cross.values).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)
        sees = layout.cross_mask()
        # A softmax over nothing is NaN: let such queries see everything and drop the result.
        none = ~sees.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, k, v, sees | none).masked_fill(none, 0.0)
        return x + self.gate.tanh() * self.out(y.transpose(1, 2).flatten(2))
