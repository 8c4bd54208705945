"""Continuous batching: every request gets what it gets alone, nothing leaks, and nothing is computed twice."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mm.datasets.chat_template import ChatTemplate
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.attention.latent import LatentAttention
from mm.decoder.attention.ssm import Mamba2
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.encoders.none import NoEncoder
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import LinearProjector
from mm.generation import generate
from mm.generation.batching import Engine
from mm.generation.caches.paged import OutOfPages, Pages, Table
from mm.model import MultimodalModel, TowerConfig
from mm.testing import spread
from mm.tokenizers.image import ImageTokenizer

MIXERS: dict[str, Any] = {
    "full": lambda width: GroupedAttention(width, heads=2),
    "window": lambda width: GroupedAttention(width, heads=2, window=5),
    "latent": lambda width: LatentAttention(width, heads=2, kv_rank=8, nope_dim=6, rope_dim=4, v_dim=6),
    "ssm": lambda width: Mamba2(width, head_dim=12),
}


def model_of(tokenizer, mixers: list[str], bridge: Any = LinearProjector) -> MultimodalModel:
    torch.manual_seed(0)
    decoder = Decoder(
        24,
        {name: MIXERS[name] for name in mixers},
        {"f": lambda width: GatedFFN(width, hidden=16)},
        [LayerGroup([f"{name}/f" for name in mixers])],
        tokenizer.vocab_size,
        init_std=None,
    )
    towers = {"image": TowerConfig(ImageTokenizer(patch=2, max_tokens=16), bridge, NoEncoder)}
    model = MultimodalModel(tokenizer, decoder, towers, ChatTemplate("compact"))
    return spread(model).eval()


@pytest.fixture(scope="module", params=["full", "window full", "latent", "ssm full", "cross"])
def model(request, tokenizer) -> MultimodalModel:
    if request.param == "cross":
        return model_of(tokenizer, ["full", "full"], GatedCrossAttentionBridge)
    return model_of(tokenizer, request.param.split())


@pytest.fixture
def samples(ask):
    texts = ["red?", "what colour is the shape?", "is it blue? " * 5, "green or red", "what colour is the thing?"]
    return [ask(text, f"q{i}", image) for i, (text, image) in enumerate(zip(texts, [3, None, 5, 7, 3], strict=True))]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("sizes", [{}, {"page_size": 3, "chunk": 5, "max_rows": 2, "pages": 60}], ids=["wide", "tight"])
def test_each_gets_what_it_gets_alone(model, samples, options, sizes) -> None:
    expected = generate(model, samples, max_new_tokens=9, seed=4, **options)
    engine = Engine(model, **sizes)
    tickets = []
    for sample in samples:  # they come while others are at work
        tickets.append(engine.submit(sample, max_new_tokens=9, seed=4, **options))
        engine.step()
    engine.run()
    assert [ticket.ids for ticket in tickets] == [answer.ids for answer in expected]
    assert ["".join(ticket) for ticket in tickets] == [answer.text for answer in expected]
    assert [ticket.finish_reason for ticket in tickets] == [answer.finish_reason for answer in expected]
    assert engine.pages.used == 0 and not engine.running and not engine.waiting


def test_options_of_different_requests(model, samples) -> None:
    options: list[Any] = [
        {"repetition_penalty": 1.8}, {"temperature": 0.8, "seed": 3}, {"stop_strings": ["a", "e"]},
        {"regex": "(yes|no){1,3}"}, {"temperature": 2.0, "top_p": 0.7},
    ]  # fmt: skip
    expected = [
        generate(model, [sample], max_new_tokens=9, **option)[0]
        for sample, option in zip(samples, options, strict=True)
    ]
    engine = Engine(model)
    tickets = [engine.submit(s, max_new_tokens=9, **option) for s, option in zip(samples, options, strict=True)]
    assert [ticket.text() for ticket in tickets] == [answer.text for answer in expected]


def test_a_second_turn_reads_what_is_new(tokenizer, ask) -> None:
    model = model_of(tokenizer, ["full", "window"])
    engine = Engine(model, page_size=4)
    first = ask("what colour is the big shape in the picture?", "chat", 3)
    answer = engine.submit(first, max_new_tokens=12)
    said = answer.text()
    read = engine.counts.prefilled
    assert read == answer.prompt_length and engine.counts.shared == 0 and engine.counts.encoded == 1
    again = engine.submit(first, max_new_tokens=12)
    assert again.text() == said
    assert engine.counts.prefilled - read <= 4 and engine.counts.encoded == 1 and engine.counts.remembered == 1
    read = engine.counts.prefilled
    longer = ask("what colour is the big shape in the picture? and the small one?", "other", 3)
    third = engine.submit(longer, max_new_tokens=3)
    third.text()
    assert 0 < engine.counts.prefilled - read < third.prompt_length - 20
    assert third.ids == generate(model, [longer], max_new_tokens=3)[0].ids
    other = engine.submit(ask("what colour is the big shape in the picture?", "chat", 4), max_new_tokens=12)
    read = engine.counts.prefilled
    other.text()
    assert engine.counts.prefilled - read > 16  # another picture, so nothing behind it is the same


def test_pages_are_waited_for(tokenizer, samples) -> None:
    model = model_of(tokenizer, ["full"])
    engine = Engine(model, pages=12, page_size=8)
    tickets = [engine.submit(sample, max_new_tokens=6) for sample in samples]
    most = 0
    while engine.waiting or engine.running:
        engine.step()
        most = max(most, len(engine.running))
    assert 1 <= most < len(samples)
    assert [ticket.ids for ticket in tickets] == [each.ids for each in generate(model, samples, max_new_tokens=6)]
    with pytest.raises(ValueError, match="exceed the 96 positions of all pages"):
        engine.submit(samples[0], max_new_tokens=90)


@pytest.mark.parametrize("rounds", [40, pytest.param(420, marks=pytest.mark.slow)])
def test_cancelled_at_any_step_nothing_leaks(tokenizer, samples, rounds) -> None:
    model = model_of(tokenizer, ["full"])
    engine = Engine(model, pages=40, page_size=4, max_rows=3, chunk=7)
    chance = random.Random(0)
    for _ in range(rounds):
        tickets = [engine.submit(chance.choice(samples), max_new_tokens=6) for _ in range(chance.randint(1, 4))]
        for _ in range(chance.randint(0, 12)):
            engine.step()
        for ticket in tickets:
            ticket.cancel()
            assert ticket.finish_reason is not None
        assert engine.pages.used == 0 and not engine.running and not engine.waiting
        assert engine.pages.available == 40
    whole = engine.submit(samples[0], max_new_tokens=6)
    assert whole.text() == generate(model, samples[:1], max_new_tokens=6)[0].text


def test_what_fails_for_one_goes_on_for_the_others(tokenizer, samples, monkeypatch) -> None:
    model = model_of(tokenizer, ["full"])
    engine = Engine(model)
    good = engine.submit(samples[1], max_new_tokens=8)
    bad = engine.submit(samples[3], max_new_tokens=8)
    logits = model.logits

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden).clone()
        if len(out) == 2:
            out[1] = float("nan")
        return out

    monkeypatch.setattr(model, "logits", broken)
    with pytest.raises(ValueError, match="sample q3: the logits for token .* are NaN"):
        bad.text()
    monkeypatch.undo()
    assert good.text() == generate(model, [samples[1]], max_new_tokens=8)[0].text
    assert engine.pages.used == 0


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"draft": "lookup"}, {"cache": "int8"}, {"top_k": 3, "penalty_alpha": 0.1}],
)
def test_what_it_cannot_do_is_named(tokenizer, samples, options: Any) -> None:
    with pytest.raises(ValueError, match=next(name for name in options if name != "top_k")):
        Engine(model_of(tokenizer, ["full"])).submit(samples[0], **options)


def test_pages_by_hand() -> None:
    pages = Pages(1, count=4, size=2)
    first, text = Table(), ["a", "b", "c", "d", "e"]
    assert pages.share(first, text) == 0
    pages.reserve(first, 5)
    first.length = 5
    pages.register(first, text)
    assert pages.used == 3 and pages.available == 1
    second = Table()
    assert pages.share(second, text) == 4 and second.pages == first.pages[:2]
    third = Table()
    assert pages.share(third, ["a", "b", "c", "x", "y"]) == 2
    fourth = Table()
    assert pages.share(fourth, ["a", "b"]) == 0  # the last position is always read
    with pytest.raises(OutOfPages):
        pages.reserve(fourth, 4)
    assert fourth.pages == []
    for table in (first, second, third):
        pages.release(table)
    assert pages.used == 0 and pages.available == 4
    pages.reserve(fourth, 8)  # what was known makes room
    assert len(fourth.pages) == 4
    pages.release(fourth)
    assert pages.share(Table(), text) == 0


def test_pages_that_grow(tokenizer, samples) -> None:
    model = model_of(tokenizer, ["full", "latent"])
    expected = generate(model, samples, max_new_tokens=9, seed=4)
    engine = Engine(model, pages=None, page_size=2)
    engine.pages = Pages(2, count=3, size=2, grows=True)  # less than one prompt: it grows again and again
    tickets = [engine.submit(sample, max_new_tokens=9, seed=4) for sample in samples]
    engine.run()
    assert [ticket.ids for ticket in tickets] == [answer.ids for answer in expected]
    assert engine.pages.used == 0 and engine.pages.sound and engine.pages.count > 40
    count = engine.pages.count
    assert engine.submit(samples[2], max_new_tokens=9, seed=4).text() == expected[2].text
    assert engine.pages.count == count and engine.counts.shared > 20, "what was known before it grew still is"


def test_unsound_pages_are_noticed() -> None:
    pages = Pages(1, count=4, size=1)
    table = Table()
    pages.reserve(table, 3)
    assert not pages.sound, "in use"
    table.length = 2
    pages.register(table, ["a", "b"])
    pages.release(table)
    assert pages.sound
    lost = pages._free.pop()
    assert not pages.sound
    pages._free.append(lost)
    pages._free.append(next(iter(pages._known.values())))
    assert not pages.sound, "two owners"
    pages._free.pop()
    pages._key_of.popitem()
    assert not pages.sound, "known, and not known to be"


def test_requests_that_come_together_share_too(tokenizer, ask) -> None:
    model = model_of(tokenizer, ["full", "window"])
    asked = [ask("what colour is the big shape in the picture?" + end, f"q{end}", 3) for end in ("", "!", "?", "")]
    engine = Engine(model, page_size=1)
    tickets = [engine.submit(sample, max_new_tokens=6) for sample in asked]
    engine.step()
    assert [len(ticket.ids) for ticket in tickets] == [1] * 4, "all are read in one step, of which they take little"
    assert tickets[0].shared == 0 and all(t.shared > t.prompt_length // 2 for t in tickets[1:])
    assert [ticket.text() for ticket in tickets] == [answer.text for answer in generate(model, asked, 6)]


def test_no_step_reads_more_than_a_chunk(tokenizer, samples) -> None:
    engine = Engine(model_of(tokenizer, ["full"]), chunk=7)
    for sample in samples:
        engine.submit(sample, max_new_tokens=6)
    while engine.waiting or engine.running:
        before = engine.counts.prefilled
        engine.step()
        assert engine.counts.prefilled - before <= 7


def test_the_first_token_waits_for_nothing(tokenizer, samples) -> None:
    engine = Engine(model_of(tokenizer, ["full"]))
    ticket = engine.submit(samples[0], max_new_tokens=5)
    engine.step()
    assert len(ticket.ids) == 1 and engine.counts.steps == 0
