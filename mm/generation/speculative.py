"""Speculative decoding: something cheap drafts tokens, and the model checks several of them in one pass.

Answers are distributed as those of plain sampling, whatever the draft; without sampling they are the same (Leviathan et
al. 2023, arXiv 2211.17192). One request at a time. Shape legend: `n` drafted tokens, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mm.decoder.cache import Cache
from mm.generation.logprobs import likelihoods
from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel, Prompts, Step, Steps, read, same_tokenizer
from mm.generation.rows import Rows
from mm.generation.sampling import History, draw
from mm.types import Sequence

NGRAM = 3  # tokens at the end of the text that prompt lookup looks for, at most


@dataclass
class Draft:
    """Proposed `ids`, and the distributions (n, V) that they were drawn from; None: each was certain."""

    ids: list[int]
    distributions: Tensor | None = None


class Drafter(Protocol):
    """Proposes how one answer goes on. `settle` tells it what stood: the model's hidden states (1, m, D) of the m last
    tokens that it has read, all of the answer but its newest."""

    def propose(self, answer: list[int], count: int, history: History | None) -> Draft: ...
    def settle(self, answer: list[int], hidden: Tensor) -> None: ...


@dataclass
class Counts:
    """How speculation went: tokens drafted, and of these accepted; passes of the model that checked them."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@torch.inference_mode()
def speculate(
    model: GenerativeModel,
    prompts: Prompts,
    decoding: Decoding,
    stops: Collection[int],
    max_new_tokens: int,
    counts: Counts | None = None,
) -> Steps:
    """One yield a token, as the engine's plain loop, for one prompt. `counts` is added to.

    Raises ValueError for a model or a draft that cannot: recurrent layers, another tokenizer, no prediction heads.
    """
    counts = Counts() if counts is None else counts
    _check_takes_back(model)
    carried = Rows(model, prompts, decoding, stops)
    cache = carried.cache
    output = model(**prompts.inputs, cache=cache)
    length = int(output.sequence.mask.sum())
    logits = output.head(output.hidden[:, length - 1]).float()
    generator = prompts.generators[0] if prompts.generators else torch.Generator()
    carried.begin(logits)
    drafter = _drafter(model, prompts, decoding, generator, output.hidden[:, :length], output.sequence)
    del output
    answer: list[int] = []
    draft, hidden = Draft([]), None
    while True:
        new = _accept(logits, draft, carried, generator, len(answer) + 1)
        counts.accepted += len(new) - 1
        if hidden is not None:
            cache.drop_last(len(draft.ids) - len(new) + 1)
            drafter.settle([*answer, *new], hidden[:, : len(new)])
        top = decoding.logprobs
        likely = [] if top is None else likelihoods(logits[: len(new)], new, top)
        for place, token in enumerate(new):
            answer.append(token)
            yield Step([0], [token], likely[place : place + 1] or None)
            if carried.ends(answer) or len(answer) == max_new_tokens:
                return
        draft = drafter.propose(answer, min(decoding.draft_length, max_new_tokens - len(answer) - 1), carried.history)
        counts.drafted, counts.passes = counts.drafted + len(draft.ids), counts.passes + 1
        hidden = model.advance(torch.tensor([[answer[-1], *draft.ids]], device=logits.device), cache)
        logits = model.logits(hidden)[0].float()


def _accept(logits: Tensor, draft: Draft, carried: Rows, generator: torch.Generator, step: int) -> list[int]:
    """The drafted ids that stand, and one more: the model's own after the last of them. logits (n + 1, V)."""
    new: list[int] = []
    decoding = carried.decoding
    for place in range(len(draft.ids) + 1):
        here = logits[place : place + 1]
        if not bool(here.amax().isfinite()):
            carried.prompts.refuse(0, step + place)
        here = carried.mask(here)
        token = draft.ids[place] if place < len(draft.ids) else None
        if decoding.greedy:
            chosen = int(decoding.penalise(here, carried.history).argmax())
        else:
            shaped = decoding.filter(here, carried.history)[0]
            chosen = _test(shaped, token, draft.distributions, place, generator)
        new.append(chosen)
        if chosen in carried.stops:
            break
        carried.push(torch.tensor([chosen], device=logits.device))
        if chosen != token:
            break
    return new


def _test(
    logits: Tensor, token: int | None, distributions: Tensor | None, place: int, generator: torch.Generator
) -> int:
    """The drafted token with probability min(1, p / q), else one drawn from what p has more than q. logits (V,)."""
    p = logits.double().softmax(-1)
    if token is not None:
        q = torch.zeros_like(p) if distributions is None else distributions[place].double()
        if distributions is None:
            q[token] = 1.0
        if torch.rand((), generator=generator, dtype=torch.float64) < p[token] / q[token]:
            return token
        p = (p - q).clamp(min=0)  # has mass wherever a token can be refused: p < q there, so p > q elsewhere
    return int(draw(p.log()[None], torch.rand(1, generator=generator, dtype=torch.float64)))


class ModelDrafter:
    """Another, smaller model with the same tokenizer, decoding by the same rules."""

    def __init__(self, model: Any, prompts: Prompts, decoding: Decoding, generator: torch.Generator) -> None:
        _check_takes_back(model)
        self.model, self.decoding, self.generator = model, decoding, generator
        self.cache = model.new_cache()
        read(model, prompts, self.cache)
        self.read: list[int] = []  # of the answer

    def propose(self, answer: list[int], count: int, history: History | None) -> Draft:
        ids: list[int] = []
        kept: list[Tensor] = []
        history = None if history is None else history.copy()
        unread = answer[len(self.read) :]
        for _ in range(count):
            hidden = self.model.advance(torch.tensor([unread], device=self.model.device), self.cache)
            self.read += unread
            logits = self.model.logits(hidden[:, -1]).float()
            chosen = self.decoding.choose(logits, [self.generator], history)
            kept.append(self.decoding.filter(logits, history)[0].double().softmax(-1))
            if history is not None:
                history.push(chosen)
            unread = chosen.tolist()
            ids += unread
        return Draft(ids, torch.stack(kept) if kept and not self.decoding.greedy else None)

    def settle(self, answer: list[int], hidden: Tensor) -> None:
        same = 0
        while same < min(len(self.read), len(answer)) and self.read[same] == answer[same]:
            same += 1
        self.cache.drop_last(len(self.read) - same)
        del self.read[same:]


class LookupDrafter:
    """What followed the last time that the text's last tokens stood in it (prompt lookup, Saxena 2023)."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompt = prompts.ids[0].tolist()

    def propose(self, answer: list[int], count: int, history: History | None) -> Draft:
        text = [*self.prompt, *answer]
        for size in range(min(NGRAM, len(text) - 1), 0, -1):
            wanted = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == wanted:
                    found = text[start + size : start + size + count]
                    text_only = next((place for place, token in enumerate(found) if token < 0), len(found))
                    return Draft(found[:text_only])
        return Draft([])

    def settle(self, answer: list[int], hidden: Tensor) -> None:
        pass  # it reads the text anew each time


class PredictionDrafter:
    """The model's own multi-token-prediction modules: depth k drafts the token k places after the newest.

    What a depth makes of a token rests on the depth before it one token earlier, so each keeps the state of the newest
    token that stands, and every depth reads what stands again, the drafts apart.
    """

    def __init__(
        self, model: Any, decoding: Decoding, generator: torch.Generator, hidden: Tensor, sequence: Sequence
    ) -> None:
        self.model, self.decoding, self.generator = model, decoding, generator
        self.modules = model.decoder.mtp
        if self.modules is None:
            raise ValueError("draft='mtp': this model has no modules for multi-token prediction; use 'lookup'")
        depths = range(len(self.modules.depths))
        self.caches: list[Cache] = [self.modules.new_cache() for _ in depths]
        self.next_index = sequence.index[:, hidden.shape[1] - 1] + 1
        self.next_position = sequence.positions[:, : hidden.shape[1]].amax((1, 2)) + 1
        # Of the newest token that stands, (1, 1, D) each, none where too little stands: the model's, then each depth's.
        self.states = [hidden[:, -1:]]
        for depth in depths:
            previous = hidden[:, :-1]
            hidden = self._step(depth, previous, sequence.columns(depth + 1, depth + 1 + previous.shape[1]))
            self.states.append(hidden[:, -1:])
        self.settled = 0  # tokens of the answer that every depth has read

    def propose(self, answer: list[int], count: int, history: History | None) -> Draft:
        ids: list[int] = []
        kept: list[Tensor] = []
        history = None if history is None else history.copy()
        previous = self.states[0]
        for depth in range(min(count, len(self.caches))):
            state = self._read(depth, previous, [answer[-1], *ids])
            self.caches[depth].drop_last(state.shape[1])
            logits = self.model.logits(state[:, -1]).float()
            chosen = self.decoding.choose(logits, [self.generator], history)
            kept.append(self.decoding.filter(logits, history)[0].double().softmax(-1))
            if history is not None:
                history.push(chosen)
            ids += chosen.tolist()
            previous = torch.cat([self.states[depth + 1], state], 1)
        return Draft(ids, torch.stack(kept) if kept and not self.decoding.greedy else None)

    def settle(self, answer: list[int], hidden: Tensor) -> None:
        read = answer[self.settled : self.settled + hidden.shape[1]]
        states = [hidden[:, -1:]]
        for depth in range(len(self.caches)):
            previous = torch.cat([self.states[depth], hidden[:, :-1]], 1)
            hidden = self._read(depth, previous, read)
            states.append(hidden[:, -1:] if hidden.shape[1] else self.states[depth + 1])
        self.states, self.settled = states, self.settled + len(read)
        self.next_index, self.next_position = self.next_index + len(read), self.next_position + len(read)

    def _read(self, depth: int, previous: Tensor, ids: list[int]) -> Tensor:
        """States of a depth for the answer's next tokens; the first of them have none where too little stands."""
        skipped = len(ids) - previous.shape[1]
        new = torch.tensor([ids[skipped:]], device=previous.device, dtype=torch.long)
        sequence = self.model.text_after(new, self.next_index + skipped, self.next_position + skipped)
        return self._step(depth, previous, sequence)

    def _step(self, depth: int, previous: Tensor, sequence: Sequence) -> Tensor:
        if not previous.shape[1]:
            return previous
        return self.modules.step(depth, previous, sequence, self.caches[depth])[0]


def _drafter(
    model: Any, prompts: Prompts, decoding: Decoding, generator: torch.Generator, hidden: Tensor, sequence: Sequence
) -> Drafter:
    if decoding.draft == "lookup":
        return LookupDrafter(prompts)
    if decoding.draft == "mtp":
        return PredictionDrafter(model, decoding, generator, hidden, sequence)
    other = decoding.draft
    same_tokenizer("draft", other, model)
    return ModelDrafter(other, prompts, decoding, generator)


def _check_takes_back(model: Any) -> None:
    """Raises ValueError for a model whose cache cannot forget its newest tokens."""
    decoder = getattr(model, "decoder", None)
    if decoder is None:
        raise ValueError(f"draft: {type(model).__name__} has no decoder whose cache could forget a token")
    recurrent = {type(module).__name__ for module in decoder.modules() if hasattr(module, "cache_numbers_fixed")}
    if recurrent or decoder.rereader.lengths:
        what = ", ".join(sorted(recurrent)) or "LongRoPE"
        raise ValueError(f"draft: {what} cannot forget a token once it is read, as speculative decoding must")
