"""Thinking budgets: never a token more, never a token less than the model wants within it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.datasets.published_template import PublishedTemplate
from mm.generation import generate, generate_ids, stream
from mm.generation.batching import Engine
from mm.generation.testing import ScriptedModel
from mm.generation.thinking import ThinkingBudget
from mm.model import MultimodalModel
from mm.testing import tiny_decoder
from mm.types import Sample

TAGS = ("<t>", "</t>")


@pytest.fixture(scope="module")
def model(tokenizer) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size)).eval()


def test_a_short_thought_is_left_alone(tokenizer, ask) -> None:
    model = ScriptedModel(tokenizer, lambda sample: "<t>hm</t>four")
    (answer,) = generate(model, [ask("?")], 60, thinking_budget=20, thinking_tags=TAGS)
    assert (answer.text, answer.reasoning) == ("four", "hm")
    assert tokenizer.decode(answer.ids) == "<t>hm</t>four"


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"num_beams": 3}, {"draft": "lookup"}])
def test_a_long_one_is_closed(model, budget: int, options: Any) -> None:
    """The prompt opens the span, as templates for reasoning do; random weights never close it."""
    tokenizer = model.tokenizer
    prompt = torch.tensor([[*tokenizer.encode("why? <t>")], [*tokenizer.encode("how so? ")]][:1])
    closing = tokenizer.encode("</t>")
    found = generate_ids(
        model, prompt, max_new_tokens=30, stop=[], thinking_budget=budget, thinking_tags=TAGS, **options
    )[0].tolist()
    assert found[budget : budget + len(closing)] == closing
    assert len(found) == 30
    free = generate_ids(model, prompt, max_new_tokens=30, stop=[], **options)[0].tolist()
    if "num_beams" not in options:
        assert found[:budget] == free[:budget]  # until then it is what the model says


def test_rows_of_a_batch_and_of_an_engine(tokenizer) -> None:
    """The template opens the span of those with a system turn; a user who spells a tag opens none."""
    torch.manual_seed(0)
    source = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt and messages[0].role == 'system' %}<t>"
        "{% elif add_generation_prompt and messages[1:] %}<t>hm</t>{% endif %}"
    )
    template = PublishedTemplate([tokenizer.special("<|end|>")], source)
    model = MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size), template=template).eval()
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "why? <t>"}
    samples = [Sample("a", [system, user]), Sample("b", [user]), Sample("c", [user, user])]
    options: Any = {"max_new_tokens": 20, "thinking_budget": 4, "thinking_tags": TAGS}
    together = generate(model, samples, **options)
    closing = tokenizer.encode("</t>")
    assert [answer.ids[4 : 4 + len(closing)] == closing for answer in together] == [True, False, False]
    assert together[0].reasoning == tokenizer.decode(together[0].ids[:4]).strip("\n")
    assert [answer.reasoning is None for answer in together] == [False, True, True]
    assert together == [generate(model, [sample], **options)[0] for sample in samples]
    assert ["".join(stream(model, sample, **options)) for sample in samples] == [a.text for a in together]
    engine = Engine(model)
    tickets = [engine.submit(sample, **options) for sample in samples]
    assert [ticket.text() for ticket in tickets] == [answer.text for answer in together]
    assert [ticket.reasoning for ticket in tickets] == [answer.reasoning for answer in together]


def test_spans_open_close_and_open_again(tokenizer) -> None:
    opening, closing = (tokenizer.encode(tag) for tag in TAGS)
    budget = ThinkingBudget(tokenizer, [torch.tensor([50, 51])], 2, TAGS)
    width = tokenizer.vocab_size

    def allowed() -> list[int]:
        return (budget.mask(torch.zeros(1, width))[0] == 0).nonzero().flatten().tolist()

    for _ in range(2):
        for token in [60, *opening, 61, 62]:
            assert len(allowed()) == width
            budget.push([token])
        for token in closing:
            assert allowed() == [token]
            budget.push([token])
    budget.push(opening[:1])
    budget.keep([0, 0])
    assert len(budget.mask(torch.zeros(2, width)).unique()) == 1
