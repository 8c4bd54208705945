"""What every objective returns, and the loss that most share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mm.model import ModelOutput, MultimodalModel
from mm.objectives.cross_entropy import cross_entropy
from mm.types import IGNORE, Batch


@dataclass
class Loss:
    """A loss as a sum and the number of things summed, so that the mean can be taken over the whole global batch.

    `total` is differentiable: the sum, balance terms included (weighted by `count`). `parts` are means for the log.
    """

    total: Tensor
    count: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    output: ModelOutput | None = None


class Objective(Protocol):
    """`trains_embedding_head` says whether the loss reaches the model's embedding head."""

    @property
    def trains_embedding_head(self) -> bool: ...

    def __call__(self, model: MultimodalModel, batch: Batch) -> Loss: ...


def next_token_loss(output: ModelOutput) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy summed over supervised positions, their number, and how many were predicted right (no gradient).

    Each label is predicted from its predecessor within document and branch; logits exist at those positions only.
    """
    sequence = output.sequence
    rows, columns = ((sequence.labels != IGNORE) & (sequence.predecessor >= 0)).nonzero(as_tuple=True)
    labels = sequence.labels[rows, columns]
    states = output.hidden[rows, sequence.predecessor[rows, columns]]
    loss, right = cross_entropy(output.head, states, labels)
    return loss, torch.full((), float(len(labels)), device=labels.device), right
