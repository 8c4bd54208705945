"""Search over whole answers with a scorer: the best of several, the most frequent, again until good, and a tree.

A scorer takes the sample and an answer's text and says how good it is, higher is better: a verifier, a reward model, a
unit test. None of these changes how single tokens are chosen; `options` are `Decoding`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch

from mm.generation.engine import Generation, generate
from mm.generation.loop import decode
from mm.generation.options import Decoding, Options
from mm.generation.requests import (
    GenerativeModel,
    Prompts,
    Request,
    check_at_least_one,
    check_model,
    encode_requests,
    request_generator,
    stop_ids,
)
from mm.generation.speaker import Speaker
from mm.types import Sample

Scorer = Callable[[Sample, str], float]


@dataclass(frozen=True)
class Scored:
    """An answer and what the scorer said of it."""

    text: str
    score: float


@dataclass(frozen=True)
class Vote:
    """The most frequent outcome, its share of the answers, and how often there was which."""

    outcome: str
    share: float
    counts: Counter[str]
    answers: list[Generation]


def sample_answers(
    model: GenerativeModel, sample: Sample, n: int, max_new_tokens: int, seed: int, **options: Unpack[Options]
) -> list[Generation]:
    """`n` answers to one chat, each with random numbers of its own.

    Raises ValueError for a temperature of 0, at which they would all be the same.
    """
    check_at_least_one(n=n)
    if n > 1 and not options.get("temperature", 0.0):
        raise ValueError("temperature=0: several answers would all be the same; give a temperature above 0")
    # As numbers apart as those of different requests with one seed, and the same whatever n is.
    seeds = [request_generator(seed, place, f"{sample.key}#{place}").initial_seed() for place in range(n)]
    return generate(model, [sample] * n, max_new_tokens, seeds, **options)


def best_of(
    model: GenerativeModel,
    sample: Sample,
    scorer: Scorer,
    n: int = 8,
    max_new_tokens: int = 256,
    seed: int = 0,
    **options: Unpack[Options],
) -> list[Scored]:
    """`n` sampled answers, the best first; of equals the earlier."""
    answers = sample_answers(model, sample, n, max_new_tokens, seed, **options)
    return sorted((Scored(a.text, scorer(sample, a.text)) for a in answers), key=lambda scored: -scored.score)


def self_consistency(
    model: GenerativeModel,
    sample: Sample,
    extract: Callable[[str], str | None] = str.strip,
    n: int = 8,
    max_new_tokens: int = 256,
    seed: int = 0,
    **options: Unpack[Options],
) -> Vote:
    """The most frequent outcome of `n` sampled answers (Wang et al. 2023, arXiv 2203.11171); of equals the earlier.

    `extract` takes the outcome out of an answer's reasoning; None where there is none, which is no vote. Raises
    ValueError if no answer has one.
    """
    answers = sample_answers(model, sample, n, max_new_tokens, seed, **options)
    outcomes = [outcome for answer in answers if (outcome := extract(answer.text)) is not None]
    if not outcomes:
        raise ValueError(
            f"sample {sample.key}: none of {n} answers has an outcome; the first: {answers[0].text[:80]!r}"
        )
    counts = Counter(outcomes)
    best, votes = counts.most_common(1)[0]
    return Vote(best, votes / len(outcomes), counts, answers)


def refine(
    model: GenerativeModel,
    sample: Sample,
    scorer: Scorer,
    threshold: float,
    tries: int = 4,
    feedback: Callable[[Scored], str] | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    **options: Unpack[Options],
) -> list[Scored]:
    """Answers until one scores `threshold`, at most `tries`: all of them, the best first.

    With `feedback` the next try sees the last one and what is said of it, as turns of the chat; without, it is another
    draw. Raises ValueError for tries that would all be the same.
    """
    check_at_least_one(tries=tries)
    if tries > 1 and feedback is None and not options.get("temperature", 0.0):
        raise ValueError("temperature=0 without feedback: every try would be the same")
    found: list[Scored] = []
    asked = sample
    for number in range(tries):
        own = request_generator(seed, number, f"{sample.key}#{number}").initial_seed()
        (answer,) = generate(model, [asked], max_new_tokens, [own], **options)
        found.append(Scored(answer.text, scorer(sample, answer.text)))
        if found[-1].score >= threshold:
            break
        if feedback is not None:
            said = {"role": "assistant", "content": answer.text}
            asked = replace(asked, messages=[*asked.messages, said, {"role": "user", "content": feedback(found[-1])}])
    return sorted(found, key=lambda scored: -scored.score)


@dataclass(eq=False)
class Node:
    """Answers that begin with `ids`: how often one was tried, and the sum of what they scored."""

    ids: list[int]
    ended: bool
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    def bound(self, exploration: float) -> float:
        """Upper confidence bound (Kocsis and Szepesvari 2006): the mean, and more for what was seldom tried."""
        if not self.visits or self.parent is None:
            return math.inf
        return self.total / self.visits + exploration * math.sqrt(math.log(self.parent.visits) / self.visits)

    def update(self, score: float) -> None:
        node: Node | None = self
        while node is not None:
            node.visits, node.total = node.visits + 1, node.total + score
            node = node.parent


class TreeSearch:
    """Monte-Carlo tree search over continuations of one answer.

    A simulation walks from the root to a leaf by the upper confidence bound, lets the model draw `width` continuations
    of at most `chunk` tokens there, plays one answer out from each of them and scores it. `scored` are all answers
    played out, the best first. Scores should lie between 0 and 1 or so: `exploration` is in their unit.

    Raises ValueError naming an argument that makes no sense, and for a temperature of 0.
    """

    def __init__(
        self,
        model: GenerativeModel,
        sample: Sample,
        scorer: Scorer,
        chunk: int = 16,
        width: int = 4,
        exploration: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        check_model(model)
        check_at_least_one(chunk=chunk, width=width, max_new_tokens=max_new_tokens)
        if not 0 <= exploration < math.inf:
            raise ValueError(f"exploration={exploration}: give a finite number from 0 up")
        self.decoding = Decoding(**options)
        if self.decoding.greedy:
            raise ValueError("temperature=0: continuations would all be the same; give a temperature above 0")
        self.model, self.sample, self.scorer = model, sample, scorer
        self.chunk, self.width, self.exploration, self.max_new_tokens = chunk, width, exploration, max_new_tokens
        self.stops = stop_ids(model)
        (self.request,) = encode_requests(model, [sample], seed, max_new_tokens, None, self.decoding.thinking)
        self.root = Node([], ended=False)
        self.scored: list[Scored] = []
        self.drawn = 0  # random streams used so far
        self.seed = seed

    def run(self, simulations: int) -> Scored:
        """Goes on for so many simulations; the best answer so far. May be called again."""
        check_at_least_one(simulations=simulations)
        for _ in range(simulations):
            leaf = self._select()
            if not leaf.ended:
                self._expand(leaf)
            leaves = leaf.children or [leaf]
            for child, ids in zip(leaves, self._play_out(leaves), strict=True):
                text = Speaker(self.model, self.decoding, self.request.opening).whole(ids)
                score = self.scorer(self.sample, text)
                child.update(score)
                self.scored.append(Scored(text, score))
        self.scored.sort(key=lambda scored: -scored.score)
        return self.scored[0]

    def _select(self) -> Node:
        node = self.root
        while node.children:
            node = max(node.children, key=lambda child: child.bound(self.exploration))
        return node

    def _expand(self, leaf: Node) -> None:
        """Different continuations only: what is drawn twice is one child."""
        room = min(self.chunk, self.max_new_tokens - len(leaf.ids))
        seen: set[tuple[int, ...]] = set()
        for ids in self._draw([leaf] * self.width, room):
            ended = ids[-1] in self.stops or len(leaf.ids) + len(ids) >= self.max_new_tokens
            if tuple(ids) not in seen:
                leaf.children.append(Node(leaf.ids + ids, ended, leaf))
            seen.add(tuple(ids))

    def _play_out(self, nodes: list[Node]) -> list[list[int]]:
        """A whole answer that begins with each of the nodes."""
        answers = [list(node.ids) for node in nodes]
        going = [place for place, node in enumerate(nodes) if not node.ended]
        longest = max((len(nodes[place].ids) for place in going), default=0)
        if going:
            for place, ids in zip(
                going, self._draw([nodes[p] for p in going], self.max_new_tokens - longest), strict=True
            ):
                answers[place] += ids
        return answers

    def _draw(self, nodes: list[Node], room: int) -> list[list[int]]:
        if room < 1:
            return [[] for _ in nodes]
        requests = [self._continued(node.ids) for node in nodes]
        found = decode(self.model, Prompts.of(self.model, requests), self.decoding, self.stops, room)
        return [each.ids for each in found]

    def _continued(self, ids: list[int]) -> Request:
        """The prompt with the beginning of an answer, and random numbers that nobody else has."""
        self.drawn += 1
        generator = request_generator(self.seed, self.drawn, f"{self.sample.key}#{self.drawn}")
        return Request(0, self.request.name, extended(self.request.encoded, ids), generator)


def extended(encoded: Any, ids: list[int]) -> Any:
    """An Encoded with more text at its end."""
    new = torch.tensor(ids, dtype=torch.long)
    return replace(
        encoded,
        ids=torch.cat([encoded.ids, new]),
        labels=torch.cat([encoded.labels, torch.full_like(new, -100)]),
        branch_ids=torch.cat([encoded.branch_ids, torch.zeros_like(new)]),
        length=encoded.length + len(ids),
        opened=encoded.opened + len(ids),
    )
