"""Beam search: several hypotheses a request, all continued at once, the best kept; and its diverse form.

Shape legend: `R` requests still searched, `n` beams of each, `V` vocabulary. A request's beams are rows side by side.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.generation.logprobs import TokenLogprob, likelihoods
from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel, Prompts
from mm.generation.rows import Rows


@dataclass(frozen=True)
class Hypothesis:
    """An answer's ids, its closing special included where it ended, and its score: log probability, penalties counted,
    over length ** length_penalty, plus the reward where there is one. `logprobs`, if asked for, are one an id."""

    score: float
    ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Group:
    """Beams that compete with one another: running ones (log probability, ids), best first, and the best ended ones."""

    size: int
    running: list[Hypothesis]
    ended: list[Hypothesis] = field(default_factory=list)

    def end(self, hypothesis: Hypothesis) -> None:
        """Keeps it if it is among the `size` best; of equals the earlier."""
        self.ended = sorted([*self.ended, hypothesis], key=lambda each: -each.score)[: self.size]

    def is_done(self, length: int, longest: int, decoding: Decoding) -> bool:
        """Whether no running beam, `length` tokens long, will end among the best (a guess unless early_stopping is
        "never": scores can rise as answers grow)."""
        if not self.running:
            return True
        if len(self.ended) < self.size:
            return False
        if decoding.early_stopping is True or decoding.reward is not None:
            return True  # what a running beam may still be given as a reward, nobody knows
        grown = longest if decoding.early_stopping == "never" and decoding.length_penalty > 0 else length
        return self.running[0].score / grown**decoding.length_penalty <= self.ended[-1].score


@torch.inference_mode()
def beam_search(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> list[list[Hypothesis]]:
    """The best hypotheses of each request, `num_beams` of them, best first. Source of the rules: `Decoding`.

    Raises ValueError naming the row whose logits are no numbers.
    """
    carried = Rows(model, prompts, decoding, stops)
    logits = carried.read()
    per_group = decoding.num_beams // decoding.num_beam_groups
    searches = [[Group(per_group, [Hypothesis(0.0, [])]) for _ in range(decoding.num_beam_groups)] for _ in prompts.ids]
    at = list(range(len(searches)))  # of each row of logits, the request it belongs to
    live = list(range(len(searches)))
    for step in range(1, max_new_tokens + 1):
        log_p = logits.log_softmax(-1)
        invalid = ~log_p.amax(-1).isfinite()
        if bool(invalid.any()):
            prompts.refuse(at[int(invalid.nonzero()[0])], step)
        log_p = decoding.penalise(carried.mask(log_p), carried.history)
        rows, tokens, at, start = [], [], [], 0
        for request in live:
            groups = searches[request]
            width = sum(len(group.running) for group in groups) if step > 1 else 1
            its = slice(start, start + width)
            found = _grow(groups, log_p[its], carried.own[its], carried, step, max_new_tokens)
            rows += [start + row for row, _ in found]
            tokens += [token for _, token in found]
            at += [request] * len(found)
            start += width
        live = list(dict.fromkeys(at))
        if not live or step == max_new_tokens:
            break
        kept, ids = (torch.tensor(each, device=logits.device) for each in (rows, tokens))
        carried.keep(kept)
        logits = carried.step(ids)
    return [sorted((h for group in groups for h in group.ended), key=lambda h: -h.score) for groups in searches]


def _grow(
    groups: list[Group], log_p: Tensor, own: Tensor, carried: Rows, step: int, max_new_tokens: int
) -> list[tuple[int, int]]:
    """One step of a request, log_p (its rows, V), `own` the model's logits behind it: its new running beams as (row,
    token), and what has ended noted."""
    decoding = carried.decoding
    taken = log_p.new_zeros(log_p.shape[-1])
    found: list[tuple[int, int]] = []
    first = 0
    for group in groups:
        if not group.running:
            continue
        base = first if step > 1 else 0
        its = slice(base, base + len(group.running))
        rows = log_p[its]
        first += len(group.running)
        scores = torch.tensor([h.score for h in group.running], device=rows.device)[:, None] + rows
        scores = scores - decoding.diversity_penalty * taken
        # Enough candidates that `size` of them go on even if every stop is among the best.
        count = min(max(2, 1 + len(carried.stops)) * group.size, scores.numel())
        running: list[Hypothesis] = []
        chosen: list[tuple[int, int]] = []
        said: list[int] = []
        for rank, (row, longer) in enumerate(_best(group, scores, own[its], count, carried, step)):
            token, ends = longer.ids[-1], carried.ends(longer.ids) or step == max_new_tokens
            if ends and rank < group.size:
                score = longer.score / step**decoding.length_penalty + _reward(longer.ids, carried)
                group.end(Hypothesis(score, longer.ids, longer.logprobs))
                said.append(token)
            if not ends and len(running) < group.size:
                running.append(longer)
                chosen.append((base + row, token))
                said.append(token)
        for token in said:
            taken[token] += 1
        group.running = running
        if group.is_done(step, max_new_tokens, decoding):
            group.running = []
        else:
            found += chosen
    return found


def _best(
    group: Group, scores: Tensor, own: Tensor, count: int, carried: Rows, step: int
) -> list[tuple[int, Hypothesis]]:
    """The `count` best continuations (beam, hypothesis) of scores (beams, V), best first; by reward where it is due."""
    best, places = scores.flatten().topk(count)
    rows, tokens = places // scores.shape[-1], (places % scores.shape[-1]).tolist()
    top = carried.decoding.logprobs
    likely = [] if top is None else likelihoods(own[rows], tokens, top)
    found: list[tuple[int, Hypothesis]] = []
    for rank, (score, row, token) in enumerate(zip(best.tolist(), rows.tolist(), tokens, strict=True)):
        if score > float("-inf"):
            before = group.running[row]
            logprobs = [*before.logprobs, likely[rank]] if likely else []
            found.append((row, Hypothesis(score, [*before.ids, token], logprobs)))
    if carried.decoding.reward is not None and step % carried.decoding.reward_every == 0:
        found.sort(key=lambda each: -(each[1].score + _reward(each[1].ids, carried)))
    return found


def _reward(ids: list[int], carried: Rows) -> float:
    decoding = carried.decoding
    if decoding.reward is None:
        return 0.0
    ids = ids[:-1] if ids[-1] in carried.stops else ids
    return decoding.reward_weight * decoding.reward(carried.model.tokenizer.decode(ids))
