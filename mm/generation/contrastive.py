"""Contrastive search: of the likeliest tokens the one that says least of what is already said (`Decoding`)."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F

from mm.generation.logprobs import likelihoods
from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel, Prompts, Step, Steps
from mm.generation.rows import Rows


@torch.inference_mode()
def contrastive_search(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    """One yield a step, as the engine's plain loop. Every step reads `top_k` tokens a row.

    A candidate's likeness is the largest cosine between its last hidden state and that of any position before it.
    """
    assert decoding.penalty_alpha is not None and decoding.top_k is not None
    carried = Rows(model, prompts, decoding, stops)
    cache = carried.cache
    output = model(**prompts.inputs, cache=cache)
    mask = output.sequence.mask
    said = F.normalize(output.hidden.float(), dim=-1)  # (R, T, D)
    rows, device = list(range(len(prompts.names))), said.device
    logits = output.head(output.hidden[torch.arange(len(rows), device=device), mask.sum(dim=1) - 1]).float()
    carried.begin(logits)
    del output
    for step in range(1, max_new_tokens + 1):
        p = decoding.penalise(carried.mask(logits), carried.history).softmax(-1)
        if bool((invalid := ~p.amax(-1).isfinite()).any()):
            prompts.refuse(rows[int(invalid.nonzero()[0])], step)
        p, candidates = p.topk(min(decoding.top_k, p.shape[-1]))  # (R, k)
        width = p.shape[-1]
        carried.keep(torch.arange(len(rows), device=device).repeat_interleave(width))
        hidden = model.advance(candidates.reshape(-1, 1), cache)[:, 0].unflatten(0, (-1, width))  # (R, k, D)
        likeness = torch.einsum("rtd,rkd->rtk", said, F.normalize(hidden.float(), dim=-1))
        likeness = likeness.masked_fill(~mask[..., None], -1.0).amax(1)
        scores = (1 - decoding.penalty_alpha) * p - decoding.penalty_alpha * likeness
        best = scores.masked_fill(p == 0, -torch.inf).argmax(-1)  # a form may leave fewer than top_k
        every = torch.arange(len(rows), device=device)
        chosen, hidden = candidates[every, best], hidden[every, best]
        ids = chosen.tolist()
        yield Step(rows, ids, None if decoding.logprobs is None else likelihoods(logits, ids, decoding.logprobs))
        # The tails are of rows times candidates here: each row's own stands at its first.
        going = [place for place, token in enumerate(ids) if not carried.ends([*carried.tails[place * width], token])]
        if not going or step == max_new_tokens:
            return
        kept = torch.tensor(going, device=device)
        carried.keep(kept * width + best[kept])
        carried.push(chosen[kept])
        said = torch.cat([said, F.normalize(hidden.float(), dim=-1)[:, None]], 1)[kept]
        mask = F.pad(mask, (0, 1), value=True)[kept]
        rows = [rows[place] for place in going]
        logits = model.logits(hidden[kept]).float()
