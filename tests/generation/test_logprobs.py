"""Log probabilities of every method: those of the model itself, read anew with the whole answer in front of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mm.datasets.packing import collate
from mm.generation.batching import Engine
from mm.generation.engine import Generation, generate, stream
from mm.generation.logprobs import TokenLogprob
from mm.generation.requests import encode_requests, stop_ids
from mm.generation.search import extended
from mm.model import MultimodalModel
from mm.testing import tiny_decoder, tiny_model

METHODS: dict[str, Any] = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.6},
    "form": {"regex": "[a-z]{3,12}"},
    "beams": {"num_beams": 3},
    "diverse beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0},
    "penalised beams": {"num_beams": 3, "frequency_penalty": 1.5},
    "contrastive search": {"penalty_alpha": 0.5, "top_k": 4},
    "prompt lookup": {"draft": "lookup"},
    "prompt lookup, sampled": {"draft": "lookup", "temperature": 1.2},
    "amateur": {"amateur": "another"},
}


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return tiny_model().eval()


@pytest.fixture(scope="module")
def amateur(model) -> MultimodalModel:
    torch.manual_seed(1)
    decoder = tiny_decoder(vocab_size=model.tokenizer.vocab_size)
    towers = {"image": tiny_model().tower("image")}
    other = MultimodalModel(model.tokenizer, decoder)
    other.towers.update(towers)
    return other.eval()


def teacher_forced(model: Any, sample: Any, answer: list[int]) -> torch.Tensor:
    """(len(answer), V): the model's log probabilities at each place of an answer, in one pass."""
    (request,) = encode_requests(model, [sample], 0, 1, None)
    encoded = extended(request.encoded, answer)
    last = request.encoded.length - 1
    with torch.no_grad():
        logits = model(collate([[encoded]])).logits
    return logits[0, last : last + len(answer)].log_softmax(-1)


def check(model: Any, sample: Any, ids: list[int], logprobs: list[TokenLogprob] | None, top: int) -> None:
    assert logprobs is not None and [each.id for each in logprobs] == ids and len(ids) > 0
    expected = teacher_forced(model, sample, ids)
    found = torch.tensor([each.logprob for each in logprobs])
    torch.testing.assert_close(found, expected[torch.arange(len(ids)), ids], rtol=1e-4, atol=1e-4)
    best = expected.topk(top).values
    torch.testing.assert_close(torch.tensor([[p for _, p in e.top] for e in logprobs]), best, rtol=1e-4, atol=1e-4)
    for row, each in zip(expected, logprobs, strict=True):
        for token, value in each.top:
            assert value == pytest.approx(float(row[token]), abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_they_are_those_of_a_teacher_forced_pass(model, amateur, ask, name: str) -> None:
    options = METHODS[name] | ({"amateur": amateur} if name == "amateur" else {})
    samples = [ask("what colour is it?", "a", image=3), ask("red?", "b")]
    answers = generate(model, samples, max_new_tokens=7, logprobs=2, **options)
    for sample, answer in zip(samples, answers, strict=True):
        check(model, sample, answer.ids, answer.logprobs, 2)
    without = generate(model, samples, max_new_tokens=7, **options)
    assert [(a.ids, a.logprobs) for a in without] == [(a.ids, None) for a in answers]  # asking changes nothing
    if "num_beams" not in options:
        told = stream(model, samples[0], max_new_tokens=7, logprobs=2, **options)
        assert "".join(told) == answers[0].text
        check(model, samples[0], told.ids, told.logprobs, 2)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7])
def test_the_score_of_beams_is_their_log_probability(model, ask, length_penalty: float) -> None:
    sample = ask("how many?", "a", image=5)
    (answer,) = generate(model, [sample], 9, num_beams=4, length_penalty=length_penalty, logprobs=0)
    ids = answer.ids
    if answer.finish_reason == "stop":
        ids = [*ids, *stop_ids(model)]
    expected = teacher_forced(model, sample, ids)[torch.arange(len(ids)), ids].sum() / len(ids) ** length_penalty
    assert answer.score == pytest.approx(float(expected), rel=1e-4)
    assert generate(model, [sample], 2)[0].score is None


def test_beams_that_the_closing_special_ends(model, ask) -> None:
    """Its likelihood counts in the score, and is not among those of the ids."""
    stop = next(iter(stop_ids(model)))
    sample = ask("how many?", "a")
    (answer,) = generate(model, [sample], 9, num_beams=3, logprobs=1, length_penalty=0.6, regex="[a-z]{4}")
    assert answer.finish_reason == "stop" and len(answer.text) == 4
    check(model, sample, answer.ids, answer.logprobs, 1)
    assert answer.logprobs is not None
    whole = [*answer.ids, stop]
    closing = teacher_forced(model, sample, whole)[-1, stop]
    total = sum(each.logprob for each in answer.logprobs) + float(closing)
    assert answer.score == pytest.approx(total / len(whole) ** 0.6, rel=1e-4)


def test_those_of_an_engine_are_generates(model, ask) -> None:
    """Different numbers of alternatives side by side, and some who did not ask."""
    samples = [ask("what colour is it?", "a", image=3), ask("red?", "b"), ask("or blue?", "c", image=1), ask("x", "d")]
    asked: list[Any] = [{"logprobs": 2}, {"logprobs": 0}, {}, {"logprobs": 2, "frequency_penalty": 1.0}]
    options: Any = {"max_new_tokens": 6, "temperature": 0.9, "seed": 5}
    engine = Engine(model, page_size=4, chunk=5)
    tickets = [engine.submit(sample, **options, **own) for sample, own in zip(samples, asked, strict=True)]
    engine.run()
    for sample, own, ticket in zip(samples, asked, tickets, strict=True):
        (expected,) = generate(model, [sample], **options, **own)
        assert ticket.ids == expected.ids
        if "logprobs" in own:
            check(model, sample, ticket.ids, ticket.logprobs, own["logprobs"])
            assert alike(ticket.logprobs, expected)
        else:
            assert ticket.logprobs is None


def alike(logprobs: list[TokenLogprob] | None, answer: Generation) -> bool:
    assert logprobs is not None and answer.logprobs is not None
    pairs = zip(logprobs, answer.logprobs, strict=True)
    return all(math.isclose(a.logprob, b.logprob, abs_tol=1e-5) and a.id == b.id for a, b in pairs)


def test_alternatives_are_in_order_and_sum_to_one(model, ask) -> None:
    samples = [ask("what is it?", "a"), ask("why?", "b")]
    answers = generate(model, samples, max_new_tokens=6, temperature=0.7, top_k=5, logprobs=3)
    for answer in answers:
        assert answer.logprobs is not None and [each.id for each in answer.logprobs] == answer.ids
        for each in answer.logprobs:
            assert len(each.top) == 3
            values = [value for _, value in each.top]
            assert values == sorted(values, reverse=True) and each.logprob <= values[0] <= 0
            if each.id in dict(each.top):
                assert dict(each.top)[each.id] == each.logprob
    (greedy,) = generate(model, samples[:1], max_new_tokens=6, logprobs=0, repetition_penalty=3.0)
    assert greedy.logprobs is not None and all(each.top == [] and each.logprob < 0 for each in greedy.logprobs)
    assert generate(model, samples[:1], max_new_tokens=2)[0].logprobs is None
    every = generate(model, samples[:1], 1, logprobs=10_000)[0].logprobs
    assert every is not None
    total = sum(math.exp(value) for _, value in every[0].top)
    assert total == pytest.approx(1.0, abs=1e-5)
