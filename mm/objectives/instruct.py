"""Instruction tuning: next-token loss on what the assistant says, and the balance of the experts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from torch import Tensor

from mm.decoder.ffn.balance import Balance, dropped_share
from mm.decoder.mtp import MultiTokenPrediction
from mm.model import ModelOutput, MultimodalModel
from mm.objectives.base import Loss, next_token_loss
from mm.types import IGNORE, Batch


class NextToken:
    """Mean cross-entropy over supervised tokens of the global batch, plus the balance losses.

    `mtp` weighs the losses of the decoder's multi-token-prediction depths, one number a depth (DeepSeek-V3's one depth:
    0.3, then 0.1); each is the cross-entropy of the same labels, over the same count. Empty: not trained, not run.
    """

    trains_embedding_head = False

    def __init__(self, balance: Balance | None = None, mtp: Seq[float] = ()) -> None:
        self.balance, self.mtp = balance or Balance(), tuple(mtp)

    @property
    def trains_mtp(self) -> bool:
        return bool(self.mtp)

    def __call__(self, model: MultimodalModel, batch: Batch) -> Loss:
        output = model(batch)
        loss, count, right = next_token_loss(output)
        safe = count.clamp(min=1)
        parts = {"lm": loss.detach() / safe, "accuracy": right / safe}
        total = loss
        if self.mtp:
            further = further_token_losses(model, output, len(self.mtp))
            for depth, (weight, (term, number, found)) in enumerate(zip(self.mtp, further, strict=True), 1):
                total = total + weight * term
                parts[f"mtp{depth}"] = term.detach() / number.clamp(min=1)
                parts[f"mtp{depth}_accuracy"] = found / number.clamp(min=1)
        routings = [routing for routing in output.routings if routing is not None]
        terms = self.balance.losses(routings, output.sequence.document_ids)
        dropped = dropped_share(routings)
        if dropped is not None:
            parts["dropped"] = dropped
        return Loss(
            total + count * sum(terms.values()), count, parts | {k: v.detach() for k, v in terms.items()}, output
        )


def further_token_losses(
    model: MultimodalModel, output: ModelOutput, depths: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`next_token_loss` of each multi-token-prediction depth; their routings join the output's, after the layers'.

    A label counts at depth k if the k tokens before it stand in its document too, which only its first ones' do not.
    Raises ValueError if the decoder has not as many depths.
    """
    mtp, sequence = model.decoder.mtp, output.sequence
    built = len(mtp.depths) if isinstance(mtp, MultiTokenPrediction) else 0
    if built != depths:
        raise ValueError(f"NextToken.mtp has {depths} weights, but the decoder's mtp has {built} depths")
    assert isinstance(mtp, MultiTokenPrediction)
    losses = []
    for state, routing, there in mtp(output.hidden, sequence):
        predictable = there.gather(1, sequence.predecessor.clamp(min=0))
        labels = sequence.labels.masked_fill(~predictable, IGNORE)
        losses.append(next_token_loss(ModelOutput(state, [], replace(sequence, labels=labels), output.head)))
        output.routings.append(routing)
    return losses
