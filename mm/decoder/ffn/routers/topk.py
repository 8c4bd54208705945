"""Top-k softmax routing (Mixtral, Qwen3-MoE, OLMoE, gpt-oss, DeepSeek-V2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mm.decoder.ffn.routers.base import Router, check_groups, keep_best_groups
from mm.types import Routing


class TopKRouter(Router):
    """The k most probable experts of a softmax.

    `gate` says where the softmax stands: "chosen" over the k chosen logits (Mixtral, gpt-oss; the same as all
    probabilities renormalised over the chosen, Qwen3), "all" over every expert, not renormalised (OLMoE, DeepSeek-V2).
    Weights are then times `scale`. With `groups`, a token's experts come from its `groups_chosen` best groups, a group
    being as good as its best expert (DeepSeek-V2). `logit_bias` is a learned bias of the logits (gpt-oss), unlike the
    selection bias that balance rules move.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        experts_per_token: int,
        gate: Literal["chosen", "all"] = "chosen",
        scale: float = 1.0,
        groups: int = 1,
        groups_chosen: int = 1,
        logit_bias: bool = False,
    ) -> None:
        super().__init__(width, num_experts, experts_per_token, logit_bias)
        check_groups("TopKRouter", num_experts, experts_per_token, groups, groups_chosen)
        self.gate, self.scale = gate, scale
        self.groups, self.groups_chosen = groups, groups_chosen

    def weight_sum(self) -> float | None:
        return self.scale if self.gate == "chosen" or self.experts_per_token == self.num_experts else None

    def route(self, logits: Tensor, mask: Tensor) -> Routing:
        scores = logits.softmax(-1)
        merit = keep_best_groups(scores + self.bias, self.groups, self.groups_chosen, best=1)
        indices = merit.topk(self.experts_per_token, -1).indices
        weights = scores.gather(-1, indices)
        if self.gate == "chosen":
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(indices, weights * self.scale, logits, scores, mask)
