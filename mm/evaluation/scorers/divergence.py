"""How far a model's next-token distribution is from a reference model's: Kullback-Leibler divergence."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(logits: Tensor, reference: Tensor, mask: Tensor | None = None, block: int = 1024) -> dict[str, float]:
    """KL(reference || model) in nats per token, over the positions where `mask` (...) is true.

    `logits` and `reference` (..., V). Returns "kl" (the mean), "kl_max", "top1_agreement" (how often the likeliest
    token is the same) and "tokens". Computed in float64, `block` positions at a time. Raises ValueError for shapes that
    differ and for no positions.
    """
    if logits.shape != reference.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and the reference's {tuple(reference.shape)} differ in shape")
    ours, theirs = logits.reshape(-1, logits.shape[-1]), reference.reshape(-1, reference.shape[-1])
    if mask is not None:
        chosen = mask.reshape(-1).bool()
        ours, theirs = ours[chosen], theirs[chosen]
    if not len(ours):
        raise ValueError("no positions to compare: the mask is empty")
    parts, agree = [], 0
    for start in range(0, len(ours), block):
        log_q = ours[start : start + block].double().log_softmax(-1)
        log_p = theirs[start : start + block].double().log_softmax(-1)
        # A token that the reference rules out (probability 0) adds nothing, whatever the model says of it.
        parts.append(torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1))
        agree += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    each = torch.cat(parts)
    return {
        "kl": each.mean().item(),
        "kl_max": each.max().item(),
        "top1_agreement": agree / len(each),
        "tokens": len(each),
    }
