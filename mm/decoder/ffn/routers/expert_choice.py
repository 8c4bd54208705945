"""Expert choice: the experts choose tokens, not the tokens experts (Zhou et al. 2022, arXiv 2202.09368)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mm.decoder.ffn.routers.base import Router
from mm.types import Routing


class ExpertChoiceRouter(Router):
    """Each expert takes the ceil(S * experts_per_token / E) unpadded tokens that score it highest: even by design.

    `experts_per_token` is the mean (the paper's capacity factor c): some tokens get more experts, some none. Weights
    are the softmax over all experts. Whether an expert takes a token depends on every other token of the batch, later
    ones and other documents' too: in a causal language model the training loss sees a little of the future, and
    generation, which routes each new token alone, computes something else than training did. So it must be asked for
    with `look_ahead`. Of the S = 1 token of one step, ceil(experts_per_token / E) = 1 goes to every expert.
    """

    steerable = False

    def __init__(self, width: int, num_experts: int, experts_per_token: int, look_ahead: bool = False) -> None:
        super().__init__(width, num_experts, experts_per_token)
        if not look_ahead:
            raise ValueError(
                "ExpertChoiceRouter looks ahead: whether an expert takes a token depends on later tokens, so causal "
                "training leaks the future and generation computes something else; set look_ahead: true to accept "
                "this, or use TopKRouter or SigmoidBiasRouter"
            )

    def route(self, logits: Tensor, mask: Tensor) -> Routing:
        scores = logits.softmax(-1)
        real = int(mask.sum())
        room = min(real, math.ceil(real * self.experts_per_token / self.num_experts))
        takers = scores.masked_fill(~mask[:, None], -1.0).topk(room, 0).indices  # (room, E) token indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, takers, True)
        # Each token's experts side by side, the widest row deciding how many columns there are.
        columns = max(1, int(kept.sum(-1).max())) if len(kept) else 1
        indices = (scores + 2.0 * kept).topk(columns, -1).indices
        return Routing(indices, scores.gather(-1, indices), logits, scores, mask, kept=kept.gather(-1, indices))
