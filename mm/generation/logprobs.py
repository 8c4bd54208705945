"""How likely each token of an answer was to the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mm.generation.requests import GenerativeModel

CHUNK = 256  # positions whose logits are held at a time


class TokenLogprob(NamedTuple):
    """A token's log probability under the model itself, before penalties, temperature, filters, forms, amateurs and
    steering; and the likeliest tokens at its place, (id, log probability), best first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


def likelihoods(logits: Tensor, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of each row of logits (B, V) the log probability of its id, and the `top` likeliest."""
    log_p = logits.log_softmax(-1)
    best, places = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    chosen = log_p.gather(1, torch.tensor(ids, device=log_p.device)[:, None])[:, 0].tolist()
    alternatives = zip(places.tolist(), best.tolist(), strict=True)
    return [
        TokenLogprob(token, value, list(zip(*pairs, strict=True)))
        for token, value, pairs in zip(ids, chosen, alternatives, strict=True)
    ]


@torch.inference_mode()
def text_likelihoods(model: GenerativeModel, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """How likely each token of a text was, from the second on: one shorter than `ids`."""
    row = torch.tensor([ids], device=model.device)
    hidden = model(input_ids=row, attention_mask=torch.ones_like(row)).hidden[0, :-1]
    found: list[TokenLogprob] = []
    for start in range(0, len(hidden), CHUNK):
        logits = model.logits(hidden[start : start + CHUNK]).float()
        found += likelihoods(logits, ids[start + 1 : start + 1 + len(logits)], top)
    return found
