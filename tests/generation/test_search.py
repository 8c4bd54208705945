"""Search over whole answers: what is returned is the best that was seen, and looking longer finds better."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.generation.search import Scored, TreeSearch, best_of, refine, sample_answers, self_consistency
from mm.generation.testing import ScriptedModel
from mm.model import MultimodalModel
from mm.testing import tiny_decoder
from mm.types import Sample


@pytest.fixture(scope="module")
def model(tokenizer) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size)).eval()


@pytest.fixture
def sample(ask) -> Sample:
    return ask("say something", "q")


def letters(sample: Sample, text: str) -> float:
    """The share of letters in the first twelve characters: most of what random weights write is none."""
    return sum(letter.isalpha() for letter in text[:12]) / 12


OPTIONS: Any = {"temperature": 1.0, "max_new_tokens": 12}


def test_answers_differ_and_do_not_depend_on_how_many(model, sample) -> None:
    few, many = (sample_answers(model, sample, n, 8, 0, temperature=1.0) for n in (3, 6))
    assert [answer.ids for answer in many[:3]] == [answer.ids for answer in few]
    assert len({tuple(answer.ids) for answer in many}) == 6
    assert sample_answers(model, sample, 3, 8, 1, temperature=1.0) != few


def test_the_best_comes_first(model, sample) -> None:
    found = best_of(model, sample, letters, n=12, **OPTIONS)
    scores = [each.score for each in found]
    assert len(found) == 12 and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    assert all(each.score == letters(sample, each.text) for each in found)


def test_the_most_frequent_wins(tokenizer, ask) -> None:
    said = iter(["so it is 4", "it is 5", "hence 4", "no idea", "5", "4!"])
    model = ScriptedModel(tokenizer, lambda sample: next(said))

    def number(text: str) -> str | None:
        return next((letter for letter in text if letter.isdigit()), None)

    vote = self_consistency(model, ask("2 + 2?"), number, n=6, max_new_tokens=30, temperature=1.0)
    assert (vote.outcome, vote.share, vote.counts) == ("4", 0.6, {"4": 3, "5": 2})
    silent = ScriptedModel(tokenizer, lambda sample: "well")
    with pytest.raises(ValueError, match="none of 3 answers has an outcome; the first: 'well'"):
        self_consistency(silent, ask("2 + 2?"), number, n=3, max_new_tokens=30, temperature=1.0)


def test_again_until_it_is_good(tokenizer, ask) -> None:
    asked: list[list[Any]] = []

    def script(sample: Sample) -> str:
        asked.append(sample.messages)
        return f"try {len(asked)}"

    def scorer(sample: Sample, text: str) -> float:
        return float(text.split()[-1])

    model = ScriptedModel(tokenizer, script)
    found = refine(model, ask("go"), scorer, threshold=3.0, tries=5, feedback=lambda s: f"{s.score} is too little")
    assert found == [Scored("try 3", 3.0), Scored("try 2", 2.0), Scored("try 1", 1.0)]
    assert [message["content"] for message in asked[2][1:]] == [
        "try 1",
        "1.0 is too little",
        "try 2",
        "2.0 is too little",
    ]
    asked.clear()
    assert len(refine(model, ask("go"), scorer, threshold=9.0, tries=2, temperature=1.0)) == 2


def test_the_tree_finds_what_draws_do_not(model, sample) -> None:
    """With as many answers played out its best is better, and so is what it plays out on the whole."""
    tree = TreeSearch(model, sample, letters, chunk=2, width=4, exploration=0.1, seed=0, **OPTIONS)
    best = tree.run(60)
    played = len(tree.scored)
    assert 60 <= played <= 240 and tree.root.visits == played
    assert best == tree.scored[0] and best.score == max(each.score for each in tree.scored)
    plain = best_of(model, sample, letters, n=played, **OPTIONS)
    assert best.score > plain[0].score
    assert sum(each.score for each in tree.scored) / played > sum(each.score for each in plain) / played
    nodes = [tree.root]
    for node in nodes:
        assert len({tuple(child.ids) for child in node.children}) == len(node.children)
        assert all(child.ids[: len(node.ids)] == node.ids for child in node.children)
        if node.children:
            own = 0 if node is tree.root else 1  # it was played out once before it had children
            assert node.visits == own + sum(child.visits for child in node.children)
        nodes += node.children
    assert tree.run(1).score >= best.score


def test_the_tree_is_the_same_for_the_same_seed(model, sample) -> None:
    runs = [TreeSearch(model, sample, letters, chunk=3, seed=seed, **OPTIONS).run(4) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: best_of(m, s, letters, n=2), "temperature=0"),
        (lambda m, s: best_of(m, s, letters, n=0, temperature=1.0), "n=0"),
        (lambda m, s: refine(m, s, letters, 1.0, tries=2), "temperature=0 without feedback"),
        (lambda m, s: TreeSearch(m, s, letters), "temperature=0"),
        (lambda m, s: TreeSearch(m, s, letters, chunk=0, temperature=1.0), "chunk=0"),
        (lambda m, s: TreeSearch(m, s, letters, exploration=-1.0, temperature=1.0), "exploration=-1"),
        (lambda m, s: TreeSearch(m, s, letters, temperature=1.0).run(0), "simulations=0"),
    ],
)
def test_nonsense_is_named(model, sample, call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(model, sample)
