"""Constrained decoding: whatever the weights say, the answer has its form."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from mm.generation.beams import beam_search
from mm.generation.constraints import Constraint, Form
from mm.generation.engine import generate_ids
from mm.generation.options import Decoding
from mm.generation.requests import Prompts
from mm.model import MultimodalModel
from mm.testing import tiny_decoder

pytest.importorskip("llguidance")

REGEX = r"(yes|no), [0-9]{1,3}( (red|blue))?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 40},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["colour", "count", "tags"],
    "additionalProperties": False,
}
GRAMMAR = """
start: sum
sum: NUMBER ("+" NUMBER){1,3}
NUMBER: /[1-9][0-9]?/
"""


@pytest.fixture(scope="module")
def model(tokenizer) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size + 9)).eval()


def answers(model: MultimodalModel, rows: int, **options: Any) -> list[str]:
    """Answers to random prompts, the closing special cut off; every one must have it."""
    stop = model.tokenizer.special(model.template.end)
    ids = torch.randint(10, 200, (rows, 5), generator=torch.Generator().manual_seed(1))
    found = generate_ids(model, ids, max_new_tokens=400, stop=[stop], pad_id=stop, **options)
    assert (found == stop).any(1).all()
    return [model.tokenizer.decode(row[: row.index(stop)]) for row in found.tolist()]


def fits(answer: str) -> bool:
    found = json.loads(answer)
    return (
        list(found) == ["colour", "count", "tags"]
        and found["colour"] in ("red", "green")
        and isinstance(found["count"], int)
        and 0 <= found["count"] <= 40
        and len(found["tags"]) <= 3
        and all(isinstance(tag, bool) for tag in found["tags"])
    )


METHODS: dict[str, Any] = {
    "greedy": {},
    "sampled": {"temperature": 2.0},
    "filtered": {"temperature": 1.0, "top_k": 2, "repetition_penalty": 1.5},
    "beams": {"num_beams": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "contrastive_not": {"penalty_alpha": 0.0, "top_k": 4},
    "contrastive_only": {"penalty_alpha": 1.0, "top_k": 9},
    "lookup": {"draft": "lookup", "temperature": 1.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_answer_has_its_form(model, method) -> None:
    rows = 5
    assert all(re.fullmatch(REGEX, answer) for answer in answers(model, rows, regex=REGEX, **METHODS[method]))
    schema = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    assert all(map(fits, answers(model, rows, json_schema=SCHEMA | {"x-guidance": schema}, **METHODS[method])))
    sums = answers(model, rows, grammar=GRAMMAR, **METHODS[method])
    assert all(re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?){1,3}", answer) for answer in sums)


def test_a_draft_that_knows_no_form(model) -> None:
    expected = answers(model, 4, regex=REGEX)
    assert answers(model, 4, regex=REGEX, draft=model) == expected


def test_what_is_left_keeps_its_proportions(model) -> None:
    """Masked sampling is the model's distribution over what the form allows."""
    tokenizer = model.tokenizer
    stop = tokenizer.special(model.template.end)
    constraint = Constraint(Form(regex="a|b"), tokenizer, [stop], 1)
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    p = constraint.mask(logits).softmax(-1)[0]
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert p.nonzero().flatten().tolist() == sorted([a, b])
    torch.testing.assert_close(p[a] / p[b], (logits[0, a] - logits[0, b]).exp())
    with pytest.raises(ValueError, match="does not fit"):
        constraint.push([stop])


def test_rows_part(model) -> None:
    tokenizer = model.tokenizer
    stop = tokenizer.special(model.template.end)
    constraint = Constraint(Form(regex="ab|cd"), tokenizer, [stop], 1)
    constraint.keep([0, 0])
    constraint.push([tokenizer.encode("a")[0], tokenizer.encode("c")[0]])
    allowed = constraint.mask(torch.zeros(2, tokenizer.vocab_size)) == 0
    assert [row.nonzero().flatten().tolist() for row in allowed] == [tokenizer.encode("b"), tokenizer.encode("d")]


def test_beams_find_the_likeliest_that_fits(model) -> None:
    """All answers of a small form, scored by hand: enough beams find the best."""
    tokenizer = model.tokenizer
    stop = tokenizer.special(model.template.end)
    ids = torch.tensor([[40, 50, 60]])
    asked = Prompts({"input_ids": ids}, [ids[0]], ["it"], [])
    decoding = Decoding(num_beams=8, regex="[ab][cd][ef]", length_penalty=0.0)
    found = beam_search(model, asked, decoding, [stop], 9)[0]
    assert sorted(tokenizer.decode(h.ids[:-1]) for h in found) == sorted(
        a + c + e for a in "ab" for c in "cd" for e in "ef"
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids[0].tolist(), *found[0].ids]])).logits[0, 2:-1].log_softmax(-1)
    assert found[0].score == pytest.approx(float(logits.gather(1, torch.tensor(found[0].ids)[:, None]).sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "^regex: .*unclosed group"),
        ({"json_schema": "{"}, "^json_schema is not JSON"),
        ({"json_schema": {"type": "nonsense"}}, "^json_schema: Invalid type: nonsense"),
        ({"grammar": "start: missing"}, "^grammar: .*missing"),
        ({"regex": "a", "grammar": "start: /a/"}, "a form is one of"),
    ],
)
def test_nonsense_is_named(model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate_ids(model, torch.tensor([[40, 50]]), **options)


def test_an_end_is_needed(model) -> None:
    with pytest.raises(ValueError, match="need an id to end answers"):
        generate_ids(model, torch.tensor([[40, 50]]), stop=[], regex="a")


def test_a_model_that_likes_white_space_still_ends(model, monkeypatch) -> None:
    """JSON allows white space without end."""
    space = model.tokenizer.encode("\n")[0]
    logits = model.decoder.logits
    monkeypatch.setattr(model.decoder, "logits", lambda hidden: logits(hidden).index_fill(-1, torch.tensor([space]), 9))
    found = answers(model, 4, json_schema=SCHEMA)
    assert all(map(fits, found)) and any("\n" in answer for answer in found)
    assert all(len(answer) < 400 for answer in found)
