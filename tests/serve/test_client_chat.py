"""Chats in text through OpenAI's client: the same answers as from `generate`, with every option."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
import torch
from openai import OpenAI
from pydantic import BaseModel

from mm.serve.run import Running, running

from .attack import text_model
from .clients import always_say, async_client, client, said, user

NAME = "tiny"
LONG = "what colour is the shape? how many beeps? two. red, green or blue. what colour is the shape?"


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    torch.manual_seed(0)
    with running(text_model(), name=NAME) as here:
        yield here


@pytest.fixture(scope="module")
def ai(here: Running) -> OpenAI:
    return client(here)


def idle(here: Running) -> bool:
    """Whether nothing is held any more, a moment after the last answer at the latest."""
    end = time.monotonic() + 5
    engine = here.server.worker.engine
    while time.monotonic() < end:
        if here.server.places.used == 0 and here.server.worker.idle and not engine.running:
            return True
        time.sleep(0.01)
    return False


CHATS: list[list[Any]] = [
    user("what colour is the shape?"),
    [{"role": "system", "content": "be brief"}, *user("how many beeps?")],
    [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *user("how many beeps?")],
    [*user("red?"), {"role": "assistant", "content": "green."}, {"role": "user", "content": "blue?", "name": "ann"}],
    user([{"type": "text", "text": "red, green"}, {"type": "text", "text": "or blue?"}]),
]


@pytest.mark.parametrize("chat", CHATS)
def test_a_greedy_answer_is_that_of_generate(here: Running, ai: OpenAI, chat: list[Any]) -> None:
    plain = [
        {"role": "system", "content": "be brief"} if turn["role"] == "developer" else turn for turn in chat
    ]  # which is all that is told apart
    expected = said(here.server.model, plain, temperature=0.0)
    found = ai.chat.completions.create(model=NAME, messages=chat, max_tokens=16, temperature=0)
    choice, usage = found.choices[0], found.usage
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert usage is not None and usage.prompt_tokens == expected.prompt_length
    assert usage.completion_tokens == len(expected.ids) and usage.total_tokens == usage.prompt_tokens + len(
        expected.ids
    )
    assert found.id == f"chatcmpl-{found._request_id}" and found.model == NAME and found.object == "chat.completion"
    chunks = list(
        ai.chat.completions.create(model=NAME, messages=chat, max_completion_tokens=16, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [expected.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 3


def test_the_temperature_is_1_unless_it_is_given_and_a_seed_decides(here: Running, ai: OpenAI) -> None:
    ask = lambda **more: ai.chat.completions.create(model=NAME, messages=user("red?"), max_tokens=12, **more)  # noqa: E731
    expected = [said(here.server.model, "red?", 12, temperature=1.0, seed=seed).text for seed in (7, 8, 9)]
    assert len(set(expected)) == 3
    assert [choice.message.content for choice in ask(seed=7, n=3).choices] == expected
    assert ask(seed=8).choices[0].message.content == expected[1]
    assert ask(n=3, temperature=0).choices[0].message.content == said(here.server.model, "red?", 12).text
    free = [choice.message.content for choice in [*ask(n=2).choices, *ask(n=2).choices]]
    assert len(set(free)) == 4  # no two draw the same, without a seed


def test_choices_of_a_stream_come_apart(here: Running, ai: OpenAI) -> None:
    texts = ["", ""]
    for chunk in ai.chat.completions.create(
        model=NAME, messages=user("red?"), max_tokens=12, seed=7, n=2, stream=True, temperature=1
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [said(here.server.model, "red?", 12, temperature=1.0, seed=seed).text for seed in (7, 8)]


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_p": 0.5},
    {"temperature": 1.5, "top_p": 1.0, "extra_body": {"top_k": 5}},
    {"temperature": 1.2, "extra_body": {"min_p": 0.2}},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0, "extra_body": {"repetition_penalty": 1.5}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_sampling_options_are_those_of_generate(here: Running, ai: OpenAI, options: dict[str, Any]) -> None:
    found = ai.chat.completions.create(model=NAME, messages=user("red?"), max_tokens=12, seed=3, **options)
    same = {**options, **options.get("extra_body", {})}
    same.pop("extra_body", None)
    same = {key: value for key, value in same.items() if (key, value) != ("top_p", 1.0)}
    assert found.choices[0].message.content == said(here.server.model, "red?", 12, seed=3, **same).text
    assert found.choices[0].message.content != said(here.server.model, "red?", 12, seed=3).text


def test_stop_strings(here: Running, ai: OpenAI) -> None:
    whole = said(here.server.model, "beeps?", 24, temperature=1.0, seed=5)
    stop = whole.text[5:7]
    expected = said(here.server.model, "beeps?", 24, temperature=1.0, seed=5, stop_strings=["never", stop])
    assert expected.text == whole.text[: whole.text.index(stop)] != "" and expected.finish_reason == "stop"
    for given in (stop, ["never", stop]):
        found = ai.chat.completions.create(model=NAME, messages=user("beeps?"), max_tokens=24, seed=5, stop=given)
        assert (found.choices[0].message.content, found.choices[0].finish_reason) == (expected.text, "stop")
    with ai.chat.completions.stream(model=NAME, messages=user("beeps?"), max_tokens=24, seed=5, stop=stop) as stream:
        assert stream.get_final_completion().choices[0].message.content == expected.text


@pytest.mark.parametrize("top", [None, 0, 3])
def test_log_probabilities_are_those_of_generate(here: Running, ai: OpenAI, top: int | None) -> None:
    expected = said(here.server.model, "red?", 8, temperature=1.0, seed=2, logprobs=top or 0)
    more: Any = {} if top is None else {"top_logprobs": top}
    options: Any = {"model": NAME, "messages": user("red?"), "max_tokens": 8, "seed": 2, "logprobs": True, **more}
    found = ai.chat.completions.create(**options).choices[0].logprobs
    assert found is not None and found.content is not None and expected.logprobs is not None
    with ai.chat.completions.stream(**options) as stream:
        stream.until_done()
        streamed = stream.current_completion_snapshot.choices[0].logprobs
    assert streamed is not None and streamed.content == found.content
    pieces = here.server.model.tokenizer.token_bytes
    assert [bytes(token.bytes or []) for token in found.content] == [pieces(token) for token in expected.ids]
    for token, likely in zip(found.content, expected.logprobs, strict=True):
        assert token.logprob == pytest.approx(likely.logprob, abs=1e-5)
        assert [bytes(other.bytes or []) for other in token.top_logprobs] == [pieces(other) for other, _ in likely.top]
        assert [other.logprob for other in token.top_logprobs] == pytest.approx([p for _, p in likely.top], abs=1e-5)
    assert ai.chat.completions.create(**{**options, "logprobs": None, "top_logprobs": None}).choices[0].logprobs is None


def test_usage_says_what_was_found_in_the_cache(here: Running, ai: OpenAI) -> None:
    ask = lambda **more: ai.chat.completions.create(model=NAME, messages=user(LONG), max_tokens=4, **more)  # noqa: E731
    first, again = (ask(seed=seed, temperature=1).usage for seed in (1, 2))
    assert first is not None and again is not None
    assert first.prompt_tokens_details is not None and first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details is not None
    shared = again.prompt_tokens_details.cached_tokens
    assert shared is not None and 16 <= shared < again.prompt_tokens and shared % 16 == 0
    *chunks, last = ask(stream=True, n=2, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks) and last.choices == []
    assert last.usage.prompt_tokens == again.prompt_tokens and 2 <= last.usage.completion_tokens <= 8


class Answer(BaseModel):
    colour: Literal["red", "green", "blue"]
    beeps: int
    sure: bool


def test_answers_that_follow_a_schema(here: Running, ai: OpenAI) -> None:
    parsed = ai.chat.completions.parse(
        model=NAME, messages=user("what?"), response_format=Answer, max_tokens=200, seed=1
    )
    message = parsed.choices[0].message
    assert isinstance(message.parsed, Answer) and parsed.choices[0].finish_reason == "stop"
    back: Any = [*user("what?"), message, *user("sure?")]  # as the client has it
    again = ai.chat.completions.create(model=NAME, messages=back, max_tokens=4)
    assert again.usage is not None and again.usage.prompt_tokens > 20
    with ai.chat.completions.stream(
        model=NAME, messages=user("what?"), response_format=Answer, max_tokens=200, seed=1
    ) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.parsed == message.parsed
    assert kinds.count("content.delta") > 3 and "content.done" in kinds
    found = ai.chat.completions.create(
        model=NAME, messages=user("what?"), response_format={"type": "json_object"}, max_tokens=6, temperature=0
    ).choices[0]
    expected = said(here.server.model, "what?", 6, json_schema={"type": "object"})
    assert found.message.content == expected.text and expected.text.startswith("{")


@pytest.mark.parametrize(
    ("script", "reasoning", "text"),
    [
        ("<think>\nhm, red\n\nor blue\n</think>\n\nblue.", "hm, red\n\nor blue", "blue."),
        ("blue <think>is text here</think>", None, "blue <think>is text here</think>"),
        ("<think>and no end", "and no end", ""),
    ],
)
def test_reasoning_comes_apart(
    ai: OpenAI, monkeypatch: pytest.MonkeyPatch, script: str, reasoning: str | None, text: str
) -> None:
    always_say(monkeypatch, script)
    message: Any = ai.chat.completions.create(model=NAME, messages=user("what?"), max_tokens=60).choices[0].message
    assert (message.content, getattr(message, "reasoning_content", None)) == (text, reasoning)
    thoughts = texts = ""
    for chunk in ai.chat.completions.create(model=NAME, messages=user("what?"), max_tokens=60, stream=True):
        delta: Any = chunk.choices[0].delta
        thoughts, texts = thoughts + (getattr(delta, "reasoning_content", None) or ""), texts + (delta.content or "")
    assert (texts, thoughts) == (text, reasoning or "")


def test_reasoning_is_turned_off_bounded_and_sent_back(here: Running, ai: OpenAI) -> None:
    model = here.server.model
    ask = lambda chat, **body: ai.chat.completions.create(  # noqa: E731
        model=NAME, messages=chat, max_tokens=8, temperature=0, extra_body=body
    )
    found, plain = ask(user("what?"), thinking=False), ask(user("what?"))
    assert found.choices[0].message.content == said(model, "what?", 8, thinking=False).text
    assert found.usage is not None and plain.usage is not None
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens  # by the empty block
    assert ask(user("what?"), thinking_budget=2).choices[0].message.content == said(model, "what?", 8).text
    turn = {"role": "assistant", "content": "red", "reasoning_content": "a long thought about colours"}
    chat: Any = [*user("what?"), turn, *user("sure?")]
    expected = said(model, chat, 8)
    found = ask(chat)
    assert found.choices[0].message.content == expected.text
    assert found.usage is not None and found.usage.prompt_tokens == expected.prompt_length


def test_what_was_asked_at_once_is_answered_as_alone(here: Running) -> None:
    schema = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 2}
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 4},
        {"stop_strings": [" "]},
        {"logprobs": 2},
        {"frequency_penalty": 1.0},
        {"json_schema": schema},
        {"temperature": 0.8, "top_k": 9, "seed": 1},
        {"thinking": False},
    ]
    expected = [said(here.server.model, LONG[: 20 + 9 * place], 12, **kind) for place, kind in enumerate(kinds)]

    async def ask(ai: openai.AsyncOpenAI, place: int, kind: dict[str, Any]) -> str:
        more: dict[str, Any] = {"temperature": 0, **kind}
        body = {name: more.pop(name) for name in ("top_k", "thinking") if name in more}
        if "stop_strings" in more:
            more["stop"] = more.pop("stop_strings")
        if "logprobs" in more:
            more |= {"top_logprobs": more["logprobs"], "logprobs": True}
        if "json_schema" in more:
            named = {"name": "colours", "schema": more.pop("json_schema")}
            more["response_format"] = {"type": "json_schema", "json_schema": named}
        text = ""
        chunks = await ai.chat.completions.create(
            model=NAME,
            messages=user(LONG[: 20 + 9 * place]),
            max_tokens=12,
            stream=True,
            extra_body=body,
            **more,
        )
        async for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
        return text

    async def together() -> list[str]:
        async with async_client(here) as ai:
            return await asyncio.gather(*(ask(ai, place, kind) for place, kind in enumerate(kinds)))

    for _ in range(2):
        assert asyncio.run(together()) == [each.text for each in expected]


def test_a_stream_that_is_closed_midway_leaves_nothing(
    here: Running, ai: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = here.server.worker.engine
    assert idle(here)
    used, step = engine.pages.used, engine.step

    def slowly() -> None:  # 2000 tokens take longer than `idle` waits, on any machine
        time.sleep(0.005)
        step()

    monkeypatch.setattr(engine, "step", slowly)
    schema = {"type": "array", "items": {"const": "beep"}, "minItems": 400}  # which it cannot end soon
    form: Any = {"type": "json_schema", "json_schema": {"name": "beeps", "schema": schema}}
    options: Any = {"model": NAME, "messages": user("?"), "max_tokens": 2000, "response_format": form}
    stream = ai.chat.completions.create(stream=True, **options)
    for _ in range(5):
        next(stream)
    assert here.server.places.used == 1 and len(engine.running) == 1
    stream.close()
    assert idle(here)

    async def cancelled() -> None:
        async with async_client(here) as ai:
            with pytest.raises(openai.APITimeoutError):
                await ai.with_options(timeout=0.2).chat.completions.create(**options)
            async with await ai.chat.completions.create(stream=True, **options) as chunks:
                async for _ in chunks:
                    break

    asyncio.run(cancelled())
    assert idle(here) and engine.pages.used == used
