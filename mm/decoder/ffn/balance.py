"""Balance of a mixture of experts, each rule a switch; padding is in none of the statistics.

loss    switch   E * sum_e f_e P_e            (Switch Transformer, arXiv 2101.03961, eq. 4-6; GShard)
loss    z        mean logsumexp(logits)^2     (ST-MoE, arXiv 2202.08906, eq. 5)
update  bias     the selection bias of over-used experts falls, of under-used ones rises (arXiv 2408.15664)
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.decoder.ffn.moe import SparseMoE
from mm.types import Routing


def switch_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e: f the share of choices that went to e, P the mean probability of e; 1 when even."""
    scores = routing.scores[routing.mask]
    load = routing.load()
    share = load / load.sum().clamp(min=1)
    return routing.scores.shape[-1] * (share * scores.sum(0) / max(len(scores), 1)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared logsumexp of the router logits: keeps them small."""
    squared = routing.logits[routing.mask].logsumexp(-1).square()
    return squared.sum() / max(len(squared), 1)


@dataclass
class Balance:
    """Which rules hold, and how strongly: 0 switches a rule off."""

    switch: float = 0.01
    z: float = 0.001
    bias_rate: float = 0.0

    def losses(self, routings: Seq[Routing]) -> dict[str, Tensor]:
        """Weighted losses by name, averaged over the MoE layers; empty without MoE layers."""
        terms: dict[str, Tensor] = {}
        for name, weight, rule in (("balance/switch", self.switch, switch_loss), ("balance/z", self.z, z_loss)):
            if weight and routings:
                terms[name] = weight * torch.stack([rule(routing) for routing in routings]).mean()
        return terms

    @torch.no_grad()
    def update_biases(self, layers: Seq[SparseMoE], loads: Tensor) -> None:
        """After an optimizer step: moves each layer's selection bias by `bias_rate` against its load (layers, E)."""
        for layer, load in zip(layers, loads, strict=True):
            layer.router.bias += self.bias_rate * torch.sign(load.mean() - load)
