"""Text that goes on, through OpenAI's client: as `generate_ids` continues it, and as likely as a forward pass says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

import mm.serve.completions
from mm.generation import generate_ids
from mm.serve.limits import ServeLimits
from mm.serve.run import Running, running

from .attack import text_model
from .clients import client

NAME = "tiny"
TEXT = "what colour is the shape?"


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    torch.manual_seed(0)
    with running(text_model(), name=NAME, limits=ServeLimits(max_length=256)) as here:
        yield here


@pytest.fixture(scope="module")
def ai(here: Running) -> OpenAI:
    return client(here)


def continued(here: Running, ids: list[int], tokens: int) -> list[int]:
    """Greedily."""
    return generate_ids(here.server.model, torch.tensor([ids]), max_new_tokens=tokens)[0].tolist()


def forward(here: Running, ids: list[int]) -> torch.Tensor:
    """(T, V): how likely each token is after the first, the first two, ..."""
    model = here.server.model
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_a_prompt_is_text_or_ids_one_or_many(here: Running, ai: OpenAI) -> None:
    tokenizer = here.server.model.tokenizer
    other = "how many beeps?"
    ids, more = tokenizer.encode(TEXT), tokenizer.encode(other)
    expected = [tokenizer.decode(continued(here, each, 6)) for each in (ids, more)]
    prompts: list[Any] = [TEXT, ids, [TEXT], [ids], [TEXT, other], [ids, more]]
    for prompt in prompts:
        found = ai.completions.create(model=NAME, prompt=prompt, max_tokens=6, temperature=0)
        many = isinstance(prompt, list) and len(prompt) == 2
        assert [choice.text for choice in found.choices] == expected[: 1 + many]
        assert found.usage is not None and found.usage.prompt_tokens == len(ids) + many * len(more)
        assert found.usage.completion_tokens == 6 * (1 + many) and found.object == "text_completion"
        assert found.id == f"cmpl-{found._request_id}"
    default = ai.completions.create(model=NAME, prompt=TEXT, temperature=0, seed=1)
    assert default.usage is not None and default.usage.completion_tokens == 16


def test_choices_seeds_and_streams(ai: OpenAI) -> None:
    asked: Any = {"model": NAME, "prompt": [TEXT, "red"], "max_tokens": 6, "n": 2, "seed": 3}
    whole = ai.completions.create(**asked, logprobs=1)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 4
    assert ai.completions.create(**asked).choices[1].text == whole.choices[1].text
    assert ai.completions.create(**{**asked, "n": 1, "seed": 4}).choices[0].text == whole.choices[1].text
    texts, reasons, likely, usage = ["", "", "", ""], {}, [[], [], [], []], []
    asked |= {"echo": True, "logprobs": 1}
    for chunk in ai.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
            if choice.logprobs is not None:
                likely[choice.index] += _places(choice.logprobs)
    assert texts == [asked["prompt"][place // 2] + choice.text for place, choice in enumerate(whole.choices)]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(usage) == 1 and whole.usage is not None and usage[0].total_tokens == whole.usage.total_tokens
    for place, choice in enumerate(ai.completions.create(**asked).choices):
        assert choice.text == texts[place] and likely[place] == _places(choice.logprobs) != []


def _places(logprobs: Any) -> list[tuple[str, int]]:
    return list(zip(logprobs.tokens, logprobs.text_offset, strict=True))


def test_a_mere_echo_is_as_likely_as_a_forward_pass_says(here: Running, ai: OpenAI) -> None:
    tokenizer = here.server.model.tokenizer
    prompts = [TEXT, "é is 2 bytes; red"]
    found = ai.completions.create(model=NAME, prompt=prompts, max_tokens=0, echo=True, logprobs=3)
    assert found.usage is not None and found.usage.completion_tokens == 0
    for choice, prompt in zip(found.choices, prompts, strict=True):
        ids = tokenizer.encode(prompt)
        log_p, likely = forward(here, ids), choice.logprobs
        assert choice.text == prompt and choice.finish_reason == "length" and likely is not None
        assert likely.token_logprobs is not None and likely.top_logprobs is not None
        assert likely.token_logprobs[0] is None and likely.top_logprobs[0] is None
        expected = [log_p[place, token].item() for place, token in enumerate(ids[1:])]
        assert likely.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        best = log_p.topk(3).values
        for place, top in enumerate(likely.top_logprobs[1:]):
            assert sorted(top.values(), reverse=True) == pytest.approx(best[place].tolist(), abs=1e-4)
    assert found.choices[1].logprobs is not None
    tokens, offsets = found.choices[1].logprobs.tokens, found.choices[1].logprobs.text_offset
    assert tokens is not None and offsets is not None
    assert tokens[:3] == ["bytes:\\xc3", "bytes:\\xa9", " is"] and offsets[:3] == [0, 0, 1]


def test_answers_are_as_likely_as_a_forward_pass_says(here: Running, ai: OpenAI) -> None:
    ids = here.server.model.tokenizer.encode(TEXT)
    answer = continued(here, ids, 5)
    log_p = forward(here, ids + answer)
    expected = [log_p[len(ids) + place - 1, token].item() for place, token in enumerate(answer)]
    asked: Any = {"model": NAME, "prompt": TEXT, "max_tokens": 5, "temperature": 0}
    alone = ai.completions.create(**asked, logprobs=0).choices[0].logprobs
    assert alone is not None and alone.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert alone.top_logprobs is None and alone.text_offset is not None and alone.text_offset[0] == 0
    both = ai.completions.create(**asked, logprobs=1, echo=True).choices[0]
    assert both.logprobs is not None and both.logprobs.token_logprobs is not None
    assert both.logprobs.token_logprobs[len(ids) :] == pytest.approx(expected, abs=1e-4)
    assert both.logprobs.text_offset is not None and both.logprobs.text_offset[len(ids)] == len(TEXT)
    assert ai.completions.create(**asked).choices[0].logprobs is None


def test_text_goes_on_tags_and_all(here: Running, ai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be reasoning in a chat is text here; special tokens that a prompt spells are text too."""
    sampling = mm.serve.completions.sampling
    script = r"<think>hm</think> \n"
    monkeypatch.setattr(mm.serve.completions, "sampling", lambda form: {**sampling(form), "regex": script})
    for prompt in ("red", "red <think>"):
        asked: Any = {"model": NAME, "prompt": prompt, "max_tokens": 40}
        assert ai.completions.create(**asked).choices[0].text == "<think>hm</think> \n"
        assert "".join(chunk.choices[0].text for chunk in ai.completions.create(**asked, stream=True)) == (
            "<think>hm</think> \n"
        )
    special = next(iter(here.server.model.tokenizer.specials))
    found = ai.completions.create(model=NAME, prompt=special, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert found.text == special and found.logprobs is not None and len(found.logprobs.tokens or []) > 1


def test_stop_and_the_cache(ai: OpenAI) -> None:
    asked: Any = {"model": NAME, "prompt": TEXT * 3, "max_tokens": 12, "seed": 11}
    whole = ai.completions.create(**asked).choices[0].text
    cut = ai.completions.create(**asked, stop=[whole[4:6]])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole[: whole.index(whole[4:6])], "stop")
    assert cut.usage is not None and cut.usage.prompt_tokens_details is not None
    assert (cut.usage.prompt_tokens_details.cached_tokens or 0) >= 16


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": ""}, "invalid_value", None),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [100_000]}, "invalid_value", None),
        ({"prompt": ["a"] * 65}, "too_many_items", "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "max_tokens": 300}, "context_length_exceeded", "prompt"),
        ({"prompt": "a", "n": 9}, "invalid_value", "n"),
        ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "unknown_parameter", "suffix"),
        ({}, "missing_parameter", "prompt"),
    ],
)
def test_what_makes_no_sense_is_refused(here: Running, body: Any, code: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(here).post("/completions", body={"model": NAME, **body}, cast_to=object)
    assert (caught.value.code, caught.value.param) == (code, param)
