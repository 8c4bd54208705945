"""What every router has: a matrix to logits, a bias that steers its choice, and the choice within groups.

Shape legend: `S` tokens, `E` experts in `G` groups of equal size, `K` chosen each, `D` width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.decoder.few_rows import linear
from mm.decoder.init import Init
from mm.types import Routing


class Router(nn.Module):
    """x (S, D), mask (S,) -> Routing. All routing maths is float32, whatever the activations are.

    `bias` (E,) is a buffer that moves the choice and never enters a weight (DeepSeek-V3, arXiv 2408.15664): zero until
    a balance rule changes it. A router that such a bias cannot steer says so by `steerable` = False.
    """

    bias: Tensor
    logit_bias: nn.Parameter | None
    steerable = True

    def __init__(self, width: int, num_experts: int, experts_per_token: int, logit_bias: bool = False) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"{type(self).__name__}: experts_per_token {experts_per_token} must be between 1 and "
                f"num_experts {num_experts}"
            )
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.register_parameter("logit_bias", nn.Parameter(torch.zeros(num_experts)) if logit_bias else None)
        self.register_buffer("bias", torch.zeros(num_experts))

    def initialise(self, init: Init) -> None:
        """Small logits, whatever the decoder's own scale: the first choices are then near even."""
        nn.init.normal_(self.weight, std=0.02)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def forward(self, x: Tensor, mask: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.logit_bias is None else self.logit_bias.float()
            routing = self.route(linear(x.float(), self.weight.float(), bias), mask)
        routing.weights = routing.weights.to(x.dtype)
        return routing

    def weight_sum(self) -> float | None:
        """What a token's weights add up to, if it is the same for every token; None if it is not."""
        return None

    def route(self, logits: Tensor, mask: Tensor) -> Routing:
        """logits (S, E) float32, mask (S,) -> Routing with float32 weights."""
        raise NotImplementedError


def check_groups(router: str, num_experts: int, experts_per_token: int, groups: int, groups_chosen: int) -> None:
    """Raises ValueError where experts do not divide into groups, or the chosen groups hold too few experts."""
    if groups < 1 or num_experts % groups:
        raise ValueError(f"{router}: num_experts {num_experts} must divide evenly into groups {groups}")
    if not 1 <= groups_chosen <= groups:
        raise ValueError(f"{router}: groups_chosen {groups_chosen} must be between 1 and groups {groups}")
    room = groups_chosen * (num_experts // groups)
    if experts_per_token > room:
        raise ValueError(
            f"{router}: experts_per_token {experts_per_token} is more than the {room} experts of "
            f"groups_chosen {groups_chosen} of {groups} groups"
        )


def keep_best_groups(scores: Tensor, groups: int, groups_chosen: int, best: int) -> Tensor:
    """scores (S, E) -> the same, -inf outside the `groups_chosen` groups whose `best` highest scores sum highest.

    `best` = 1 is DeepSeek-V2's device-limited routing (arXiv 2405.04434, section 2.1.3), 2 DeepSeek-V3's (2412.19437).
    """
    if groups_chosen == groups:
        return scores
    by_group = scores.unflatten(-1, (groups, -1))
    merit = by_group.topk(min(best, by_group.shape[-1]), -1).values.sum(-1)
    chosen = torch.zeros_like(merit, dtype=torch.bool).scatter_(-1, merit.topk(groups_chosen, -1).indices, True)
    return by_group.masked_fill(~chosen[..., None], float("-inf")).flatten(-2)
