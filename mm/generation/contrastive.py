"""Contrastive search: of the likeliest tokens the one that says least of what is already said (`Decoding`)."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F

from mm.generation.caches.choose import make
from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel, Prompts, Steps
from mm.generation.sampling import History


@torch.inference_mode()
def contrastive_search(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    """One yield a step, as the engine's plain loop. Every step reads `top_k` tokens a row.

    A candidate's likeness is the largest cosine between its last hidden state and that of any position before it.
    """
    assert decoding.penalty_alpha is not None and decoding.top_k is not None
    cache = make(model, decoding.cache)
    output = model(**prompts.inputs, cache=cache)
    mask = output.sequence.mask
    said = F.normalize(output.hidden.float(), dim=-1)  # (R, T, D)
    rows, device = list(range(len(prompts.names))), said.device
    logits = output.head(output.hidden[torch.arange(len(rows), device=device), mask.sum(dim=1) - 1]).float()
    history = History.of(prompts.ids, logits.shape[-1], device) if decoding.needs_history else None
    del output
    for step in range(1, max_new_tokens + 1):
        p = decoding.penalise(logits, history).softmax(-1)
        if bool((invalid := ~p.amax(-1).isfinite()).any()):
            prompts.refuse(rows[int(invalid.nonzero()[0])], step)
        p, candidates = p.topk(min(decoding.top_k, p.shape[-1]))  # (R, k)
        width = p.shape[-1]
        cache.keep(torch.arange(len(rows), device=device).repeat_interleave(width))
        hidden = model.advance(candidates.reshape(-1, 1), cache)[:, 0].unflatten(0, (-1, width))  # (R, k, D)
        likeness = torch.einsum("rtd,rkd->rtk", said, F.normalize(hidden.float(), dim=-1))
        likeness = likeness.masked_fill(~mask[..., None], -1.0).amax(1)
        best = ((1 - decoding.penalty_alpha) * p - decoding.penalty_alpha * likeness).argmax(-1)
        every = torch.arange(len(rows), device=device)
        chosen, hidden = candidates[every, best], hidden[every, best]
        ids = chosen.tolist()
        yield rows, ids
        going = [place for place, token in enumerate(ids) if token not in stops]
        if not going or step == max_new_tokens:
            return
        kept = torch.tensor(going, device=device)
        cache.keep(kept * width + best[kept])
        said = torch.cat([said, F.normalize(hidden.float(), dim=-1)[:, None]], 1)[kept]
        mask = F.pad(mask, (0, 1), value=True)[kept]
        rows = [rows[place] for place in going]
        if history is not None:
            history.keep(kept)
            history.push(chosen[kept])
        logits = model.logits(hidden[kept]).float()
