"""The sparse mixture-of-experts layer: a router, experts, and optionally experts that every token visits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.experts import SwigluExperts
from mm.decoder.ffn.routers.topk import TopKRouter
from mm.types import Routing


class SparseMoE(nn.Module):
    """x (B, T, width), mask (B, T) -> (B, T, width) and the Routing over its B*T tokens.

    `hidden` is one expert's inner width; `shared` experts of that width see every token (DeepSeekMoE, arXiv
    2401.06066).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int = 8,
        experts_per_token: int = 2,
        shared: int = 0,
        gate: Literal["chosen", "all"] = "chosen",
    ) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.router = TopKRouter(width, num_experts, experts_per_token, gate)
        self.experts = SwigluExperts(width, hidden, num_experts)
        self.shared = GatedFFN(width, shared * hidden) if shared else None

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, 1)
        routing = self.router(tokens, mask.flatten())
        y = self.experts(tokens, routing).view_as(x).to(x.dtype)
        return (y if self.shared is None else y + self.shared(x)), routing


def moe_layers(module: nn.Module) -> list[SparseMoE]:
    """Every SparseMoE in a module, in order."""
    return [part for part in module.modules() if isinstance(part, SparseMoE)]


def max_over_mean_load(load: Tensor) -> float:
    """Load imbalance of one layer from counts (E,): 1 is even, E is one expert alone; 0 where nothing was routed."""
    return float(load.max() / load.mean()) if torch.any(load > 0) else 0.0
