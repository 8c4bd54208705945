"""Instruction tuning: next-token loss on what the assistant says, and the balance of the experts."""

from __future__ import annotations

from mm.decoder.ffn.balance import Balance
from mm.model import MultimodalModel
from mm.objectives.base import Loss, next_token_loss
from mm.types import Batch


class NextToken:
    """Mean cross-entropy over supervised tokens of the global batch, plus the balance losses."""

    trains_embedding_head = False

    def __init__(self, balance: Balance | None = None) -> None:
        self.balance = balance or Balance()

    def __call__(self, model: MultimodalModel, batch: Batch) -> Loss:
        output = model(batch)
        loss, count, right = next_token_loss(output)
        terms = self.balance.losses([routing for routing in output.routings if routing is not None])
        total = loss + count * sum(terms.values())
        safe = count.clamp(min=1)
        parts = {"lm": loss.detach() / safe, "accuracy": right / safe, **{k: v.detach() for k, v in terms.items()}}
        return Loss(total, count, parts, output)
