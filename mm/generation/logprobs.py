"""How likely each token of an answer was to the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
