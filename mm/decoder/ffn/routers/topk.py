"""Top-k softmax routing (Mixtral, Qwen3-MoE, OLMoE, gpt-oss), with a selection bias for aux-loss-free balance."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.types import Routing


class TopKRouter(nn.Module):
    """x (S, width), mask (S,) -> Routing. All routing maths is float32, whatever the activations are.

    `gate` says where the softmax stands: "chosen" over the k chosen logits (Mixtral, gpt-oss; the same as all
    probabilities renormalised over the chosen, Qwen3), "all" over every expert, not renormalised (OLMoE).
    `bias` (E,) is added to the logits' softmax for the choice alone and never enters a weight (DeepSeek-V3,
    arXiv 2408.15664); it is zero until a balance rule moves it.
    """

    bias: Tensor

    def __init__(
        self, width: int, num_experts: int, experts_per_token: int, gate: Literal["chosen", "all"] = "chosen"
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"TopKRouter: experts_per_token {experts_per_token} must be between 1 and num_experts {num_experts}"
            )
        self.num_experts, self.experts_per_token, self.gate = num_experts, experts_per_token, gate
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x: Tensor, mask: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            scores = logits.softmax(-1)
            indices = (scores + self.bias).topk(self.experts_per_token, -1).indices
            weights = scores.gather(-1, indices)
            if self.gate == "chosen":
                weights = weights / weights.sum(-1, keepdim=True)
        return Routing(indices, weights.to(x.dtype), logits, scores, mask)
