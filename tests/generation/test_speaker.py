"""Reasoning apart from the answer: in any pieces, with tags as text and as specials, in every way to get an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.chat.session import ChatSession, Settings
from mm.datasets.chat_template import ChatTemplate
from mm.datasets.published_template import PublishedTemplate
from mm.generate import answers
from mm.generation import generate, stream
from mm.generation.batching import Engine
from mm.generation.engine import generate_ids
from mm.generation.options import Decoding
from mm.generation.speaker import Speaker, Splitter
from mm.generation.testing import ScriptedModel
from mm.model import MultimodalModel
from mm.testing import tiny_decoder
from mm.tokenizers.text import TextTokenizer
from mm.types import Sample

TAGS = ("<think>", "</think>")
CASES: list[tuple[str, bool, str | None, str]] = [
    ("<think>\nhm, so\n</think>\n\nfour", False, "hm, so", "four"),
    ("\n <think>a</think>b", False, "a", "b"),
    ("four", False, None, "four"),
    ("  four\n", False, None, "  four\n"),
    ("<thin air", False, None, "<thin air"),
    ("<th", False, None, "<th"),
    ("\n", False, None, "\n"),
    ("", False, None, ""),
    ("it is <think>no</think>", False, None, "it is <think>no</think>"),
    ("<think>cut in the mid", False, "cut in the mid", ""),
    ("<think>almost</thin", False, "almost</thin", ""),
    ("<think></think>four", False, None, "four"),
    ("hm</think>\nfour </think> <think>", True, "hm", "four </think> <think>"),
    ("hm", True, "hm", ""),
    ("<think>hm</think>4", True, "<think>hm", "4"),
    ("<think>a < b </t </think>\n\n\nc\n\nd", False, "a < b </t ", "c\n\nd"),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "answer"), CASES)
def test_a_whole_text(text: str, opened: bool, reasoning: str | None, answer: str) -> None:
    splitter = Splitter(TAGS, opened)
    assert splitter.push(text) + splitter.flush() == answer
    assert splitter.reasoning == reasoning


@given(st.sampled_from(CASES), st.data())
def test_pieces_are_split_as_the_whole_is(case: Any, data: st.DataObject) -> None:
    text, opened, reasoning, answer = case
    splitter, said, rest = Splitter(TAGS, opened), "", text
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:length], rest[length:]
        said += splitter.push(piece)
        assert answer.startswith(said)  # what is shown is never taken back
        assert (reasoning or "").startswith((splitter.reasoning or "").rstrip("\n"))
    assert (said + splitter.flush(), splitter.reasoning) == (answer, reasoning)


@pytest.fixture(scope="module")
def with_tags(tokenizer) -> TextTokenizer:
    return tokenizer.with_specials(TAGS)


def test_where_tags_are_specials_only_these_count(with_tags) -> None:
    model = ScriptedModel(with_tags, lambda sample: "")
    opening, closing = (with_tags.special(tag) for tag in TAGS)
    nothing, encode = torch.tensor([], dtype=torch.long), with_tags.encode

    def said(*ids: int, stop: tuple[str, ...] = (), before: Any = nothing) -> tuple[str | None, str, bool]:
        speaker = Speaker(model, Decoding(stop_strings=stop), before)
        text = speaker.whole(ids)
        return speaker.reasoning, text, speaker.stopped

    thought = encode("\nso </think> then\n")  # spelled, which is text
    assert said(opening, *thought, closing, *encode("\n\nred")) == ("so </think> then", "red", False)
    assert said(*encode("<think>a</think>b")) == (None, "<think>a</think>b", False)
    assert said(*encode("a"), opening, *encode("b"), closing, *encode("c")) == (None, "abc", False)
    assert said(*encode("a"), closing, before=torch.tensor([7, opening])) == ("a", "", False)
    assert said(*encode("a"), before=torch.tensor([opening, *encode("\n\n"), closing, *encode("\n\n")])) == (
        None, "a", False,
    )  # fmt: skip
    assert said(opening, *encode("x#"), closing, *encode("#y"), stop=("##",)) == ("x#", "#y", False)
    assert said(opening, *encode("x##z"), closing, *encode("y"), stop=("##",)) == ("x", "", True)
    assert said(opening, *encode("x"), closing, *encode("y##z"), stop=("##",)) == ("x", "y", True)
    half = encode("é")[:1] if len(encode("é")) > 1 else []
    assert said(opening, *half, closing, *encode("y"))[0] == ("\ufffd" if half else None)


def script(sample: Sample) -> str:
    return "<think>\nwhat is it\n</think>\n\nit is red" if "think" in sample.key else "blue"


def test_every_way_to_an_answer_tells_them_apart(tokenizer, ask) -> None:
    model = ScriptedModel(tokenizer, script)
    samples = [ask("?", "think"), ask("?", "plain")]
    found = generate(model, samples, 60)
    assert [(a.text, a.reasoning) for a in found] == [("it is red", "what is it"), ("blue", None)]
    assert tokenizer.decode(found[0].ids) == script(samples[0])
    for sample, answer in zip(samples, found, strict=True):
        pieces = stream(model, sample)
        assert ("".join(pieces), pieces.reasoning) == (answer.text, answer.reasoning)
    growing = stream(model, samples[0])
    next(growing)
    assert growing.reasoning == "what is it"


# A template with both modes, as Qwen3's has them.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def qwen(tokenizer: TextTokenizer, source: str = QWEN) -> PublishedTemplate:
    specials = [name for name in ("<|im_start|>", "<|im_end|>", *TAGS) if name in tokenizer.specials]
    return PublishedTemplate([tokenizer.special("<|im_end|>")], source, specials)


@pytest.fixture(scope="module", params=["own", "qwen", "qwen, tags as text"])
def model(request, tokenizer, with_tags) -> MultimodalModel:
    torch.manual_seed(0)
    vocabulary = tokenizer if "text" in request.param else with_tags
    template = ChatTemplate("chatml") if request.param == "own" else qwen(vocabulary)
    decoder = tiny_decoder(vocab_size=vocabulary.vocab_size)
    return MultimodalModel(vocabulary, decoder, template=template).eval()


def test_the_prompt_is_the_one_that_was_asked_for(model, ask) -> None:
    """Through generate, stream and an Engine: with thinking off the prompt ends with the empty block."""
    sample, block = ask("why?"), 4 if "<think>" in model.tokenizer.specials else 6
    lengths = {}
    for thinking in (None, True, False):
        (answer,) = generate(model, [sample], 6, thinking=thinking)
        told, ticket = (
            stream(model, sample, 6, thinking=thinking),
            Engine(model).submit(sample, 6, thinking=thinking),
        )
        assert "".join(told) == ticket.text() == answer.text
        assert told.ids == ticket.ids == answer.ids
        assert told.prompt_length == ticket.prompt_length == answer.prompt_length
        lengths[thinking] = answer.prompt_length
    assert lengths[None] == lengths[True] and lengths[False] - lengths[True] >= block
    with pytest.raises(ValueError, match="thinking=False is for chats"):
        generate_ids(model, torch.tensor([[40]]), thinking=False)


def test_a_chat_forgets_what_was_thought(with_tags) -> None:
    """The next prompt has the answers alone; whoever asks is still told."""
    said = [with_tags.special(TAGS[0]), *with_tags.encode("hm"), with_tags.special(TAGS[1]), *with_tags.encode("red")]
    model, prompts = ScriptedModel(with_tags, lambda sample: said, template=qwen(with_tags)), []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        prompts.append(with_tags.decode(kwargs["batch"].input_ids[0].tolist(), skip_specials=False))

    model.register_forward_pre_hook(note, with_kwargs=True)
    session = ChatSession(model, Settings(thinking=True))
    for question in ("what color?", "why?"):
        assert "".join(session.ask(question)) == "red"
        assert session.last is not None and session.last.reasoning == "hm"
    assert session.messages[1] == {"role": "assistant", "content": "red", "reasoning_content": "hm"}
    assert prompts[1].endswith(
        "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    session.settings = Settings(thinking=False)
    list(session.ask("and?"))
    assert prompts[2].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_records_of_mm_generate_have_it_apart(tokenizer, ask) -> None:
    model, samples = ScriptedModel(tokenizer, script), [ask("?", "think"), ask("?", "plain")]
    first, second = answers(model, samples, 60, 0, {"amateur": model})  # a method that no Engine has
    assert (first["text"], first["reasoning"]) == ("it is red", "what is it") and "reasoning" not in second
    json.dumps([first, second])
