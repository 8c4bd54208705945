"""Sigmoid routing with a selection bias and group-limited choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

from torch import Tensor

from mm.decoder.ffn.routers.base import Router, check_groups, keep_best_groups
from mm.types import Routing


class SigmoidBiasRouter(Router):
    """Each expert is scored by itself, sigmoid(logit); the k with the highest score + bias are chosen (eq. 12-16).

    The bias never enters a weight. With `groups`, experts come from the `groups_chosen` groups whose two best experts
    sum highest (score + bias). `normalise` divides the chosen scores by their sum, `scale` multiplies them (2.5 in
    DeepSeek-V3). `Routing.scores` are the scores over their sum, which the sequence-wise balance loss reads (eq. 19).
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        experts_per_token: int,
        groups: int = 1,
        groups_chosen: int = 1,
        normalise: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(width, num_experts, experts_per_token)
        check_groups("SigmoidBiasRouter", num_experts, experts_per_token, groups, groups_chosen)
        self.groups, self.groups_chosen = groups, groups_chosen
        self.normalise, self.scale = normalise, scale

    def weight_sum(self) -> float | None:
        return self.scale if self.normalise else None

    def route(self, logits: Tensor, mask: Tensor) -> Routing:
        affinity = logits.sigmoid()
        merit = keep_best_groups(affinity + self.bias, self.groups, self.groups_chosen, best=2)
        indices = merit.topk(self.experts_per_token, -1).indices
        weights = affinity.gather(-1, indices)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # all sigmoids may be zero, unlike a softmax
        scores = affinity / (affinity.sum(-1, keepdim=True) + 1e-20)
        return Routing(indices, weights * self.scale, logits, scores, mask)
