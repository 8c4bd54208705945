"""The decoding loop: prompts are read once into a cache, then one token a step until every request has ended.

`B` rows (requests decoded together), `V` vocabulary. A request gets in a batch what it gets alone: rows never see one
another, and a row's random numbers come from its own seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from mm.generation.beams import beam_search
from mm.generation.contrastive import contrastive_search
from mm.generation.logprobs import TokenLogprob, likelihoods
from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel, Prompts, Step, Steps
from mm.generation.rows import Rows
from mm.generation.sampling import INVALID
from mm.generation.speculative import speculate
from mm.generation.steered import SteeredRows


class Decoded(NamedTuple):
    """What the loop made of one prompt: ids, the one that stopped it included, with their likelihoods if asked for, and
    the score of the best beam."""

    ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None


def decode(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> list[Decoded]:
    """Each prompt's answer, to the first id that is in `stops`."""
    asked = decoding.logprobs is not None
    if decoding.num_beams > 1:
        found = beam_search(model, prompts, decoding, stops, max_new_tokens)
        return [Decoded(best.ids, best.logprobs if asked else None, best.score) for best, *_ in found]
    collected: list[list[int]] = [[] for _ in prompts.names]
    logprobs: list[list[TokenLogprob]] = [[] for _ in prompts.names]
    for step in steps(model, prompts, decoding, stops, max_new_tokens):
        for place, row in enumerate(step.rows):
            collected[row].append(step.ids[place])
            if step.logprobs is not None:
                logprobs[row].append(step.logprobs[place])
    return [Decoded(ids, likely if asked else None) for ids, likely in zip(collected, logprobs, strict=True)]


def steps(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    """One yield a step. A row that got an id in `stops` is not in the next; the loop ends with the last row.

    Raises ValueError naming the row when its logits are no numbers.
    """
    if decoding.draft is not None:
        return _in_turn(speculate, model, prompts, decoding, stops, max_new_tokens)
    if decoding.steer is not None and decoding.steer.moves:
        return _steered(model, prompts, decoding, stops, max_new_tokens)
    method = _one_by_one if decoding.penalty_alpha is None else contrastive_search
    return method(model, prompts, decoding, stops, max_new_tokens)


def _in_turn(
    method: Callable[..., Steps],
    model: GenerativeModel,
    prompts: Prompts,
    decoding: Decoding,
    stops: Collection[int],
    max_new_tokens: int,
) -> Steps:
    """A method that knows one prompt at a time, for several."""
    for row, alone in enumerate(prompts.alone()):
        for step in method(model, alone, decoding, stops, max_new_tokens):
            yield step._replace(rows=[row])


@torch.inference_mode()
def _one_by_one(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    yield from _plainly(Rows(model, prompts, decoding, stops), max_new_tokens)


@torch.inference_mode(False)
@torch.no_grad()
def _steered(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    yield from _plainly(SteeredRows(model, prompts, decoding, stops), max_new_tokens)


def _plainly(carried: Rows, max_new_tokens: int) -> Steps:
    """Greedy decoding and sampling: each token is chosen from the model's distribution, and that is that."""
    prompts, decoding = carried.prompts, carried.decoding
    logits = carried.read()
    rows = list(range(len(prompts.names)))
    for step in range(1, max_new_tokens + 1):
        chosen = decoding.choose(carried.mask(logits), [prompts.generators[row] for row in rows], carried.history)
        ids = chosen.tolist()  # the one wait for the device in a step
        if INVALID in ids:
            prompts.refuse(rows[ids.index(INVALID)], step)
        yield Step(rows, ids, None if decoding.logprobs is None else likelihoods(carried.own, ids, decoding.logprobs))
        going = carried.going(ids)
        if not going or step == max_new_tokens:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going, device=chosen.device)
            carried.keep(kept)
            chosen, rows = chosen[kept], [rows[place] for place in going]
        logits = carried.step(chosen)
