"""Hierarchical routing: a router of routers (Jordan & Jacobs 1994; Shazeer et al. 2017, arXiv 1701.06538, app. B)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.decoder.few_rows import linear
from mm.decoder.ffn.routers.base import Router, check_groups
from mm.decoder.init import Init
from mm.types import Routing


class HierarchicalRouter(Router):
    """First groups, then experts within each chosen group: p(e) = p(group) * p(e | group).

    Of `groups` equal groups a token takes `groups_chosen`, and of each the same number of experts, experts_per_token /
    groups_chosen. Weights are p(e) over their sum among the chosen. `Routing.logits` are group logit + expert logit, so
    that the z-loss keeps both small; `Routing.scores` are p(e) of every expert. The selection bias of an expert moves
    the choice within its group, the mean bias of a group the choice of groups.
    """

    def __init__(
        self, width: int, num_experts: int, experts_per_token: int, groups: int = 2, groups_chosen: int = 1
    ) -> None:
        super().__init__(width, num_experts, experts_per_token)
        check_groups("HierarchicalRouter", num_experts, experts_per_token, groups, groups_chosen)
        if experts_per_token % groups_chosen:
            raise ValueError(
                f"HierarchicalRouter: experts_per_token {experts_per_token} must be a multiple of "
                f"groups_chosen {groups_chosen}: each chosen group gives equally many"
            )
        self.groups, self.groups_chosen = groups, groups_chosen
        self.group_weight = nn.Parameter(torch.empty(groups, width))

    def initialise(self, init: Init) -> None:
        super().initialise(init)
        nn.init.normal_(self.group_weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            of_group_SG = linear(x.float(), self.group_weight.float())
            of_expert_SGe = linear(x.float(), self.weight.float()).unflatten(-1, (self.groups, -1))
            routing = self._choose(of_group_SG, of_expert_SGe, mask)
        routing.weights = routing.weights.to(x.dtype)
        return routing

    def weight_sum(self) -> float | None:
        return 1.0

    def _choose(self, of_group_SG: Tensor, of_expert_SGe: Tensor, mask: Tensor) -> Routing:
        size = self.num_experts // self.groups
        group_SG, within_SGe = of_group_SG.softmax(-1), of_expert_SGe.softmax(-1)
        scores = (group_SG[..., None] * within_SGe).flatten(-2)

        bias_Ge = self.bias.unflatten(-1, (self.groups, -1))
        groups_SC = (group_SG + bias_Ge.mean(-1)).topk(self.groups_chosen, -1).indices
        merit_SCe = (within_SGe + bias_Ge).gather(1, groups_SC[..., None].expand(-1, -1, size))
        members_SCk = merit_SCe.topk(self.experts_per_token // self.groups_chosen, -1).indices
        indices = (groups_SC[..., None] * size + members_SCk).flatten(-2)

        weights = scores.gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        logits = (of_group_SG[..., None] + of_expert_SGe).flatten(-2)
        return Routing(indices, weights, logits, scores, mask)
