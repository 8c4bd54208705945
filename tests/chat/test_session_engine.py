"""A chat on the engine, with a real model: a turn reads what is new in it, whatever the template; nothing is left
behind by an answer that is stopped."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from mm.chat.session import ChatSession, Settings
from mm.datasets.chat_template import ChatTemplate, Written
from mm.datasets.published_template import PublishedTemplate
from mm.generation import generate
from mm.generation.batching import FIRST_ROOM
from mm.generation.caches.paged import Pages
from mm.model import MultimodalModel
from mm.testing import tiny_model
from mm.types import Sample

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_with(template: str) -> MultimodalModel:
    torch.manual_seed(5)
    model = tiny_model().eval()
    if template == "published":
        stop = model.tokenizer.special("<|im_end|>")
        model.template = PublishedTemplate([stop], SMOLLM2, ["<|im_start|>", "<|im_end|>"])
    else:
        model.template = ChatTemplate(template)  # pyright: ignore[reportArgumentType]
    return model


def without_structure(model: MultimodalModel) -> None:
    """Never are specials the likeliest, but for what ends an answer: what they would leave of it, others test."""
    stops = model.template.stop_ids(model.tokenizer)
    with torch.no_grad():
        for token in set(model.tokenizer.specials.values()) - stops:
            model.decoder.head.weight[token] = 0.0


@pytest.fixture
def model() -> MultimodalModel:
    return model_with("compact")


def alone(model: MultimodalModel, session: ChatSession, turn: int) -> list[int]:
    """The ids of the answer of a turn (from 1), by reading all of the chat before it at once."""
    sample = Sample(f"chat-turn-{turn}", session.messages[: 2 * turn - 1], session.media)
    options = {"temperature": session.settings.temperature, "seed": session.settings.seed}
    return generate(model, [sample], session.settings.max_new_tokens, **options)[0].ids  # pyright: ignore


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("template", ["compact", "chatml", "published"])
def test_a_turn_reads_what_is_new_in_it(template: str, temperature: float, files) -> None:
    model = model_with(template)
    without_structure(model)
    session = ChatSession(model, Settings(max_new_tokens=14, temperature=temperature, seed=3))
    plain = set(range(model.tokenizer.vocab_size)) - set(model.tokenizer.specials.values())
    read = kept = 0
    for turn, text in enumerate(["what is it?", "are you sure, <|im_end|> really?", "and the same again?"], 1):
        if turn != 2:
            session.attach("image", files["two words.png" if turn == 3 else "cat.png"])  # equal pictures
        list(session.ask(text))
        assert session.engine is not None and session.last is not None
        counts, last, answer = session.engine.counts, session.last, session.messages[-1]["content"]
        assert isinstance(answer, Written) and plain.issuperset(answer.ids) and len(answer.ids) == last.tokens > 0
        assert last.kept == kept, "all that was read or written before, to the position"
        assert counts.prefilled - read == last.prompt_length - kept
        read = counts.prefilled
        kept = last.prompt_length + last.tokens - (last.finish_reason == "length")  # a last token is never read
        assert list(answer.ids) == alone(model, session, turn)
    assert any(list(m["content"].ids) != model.tokenizer.encode(m["content"]) for m in session.messages[1::2])
    assert session.engine is not None and session.engine.counts.encoded == 1, "the picture is encoded once"
    assert session.engine.pages.used == 0


def test_specials_that_a_model_writes_stay_out_of_the_chat(model) -> None:
    session = ChatSession(model)
    user = model.tokenizer.special("<|user|>")
    yes = model.tokenizer.encode("yes")
    kept = session._written("yes", [*yes, user])
    assert isinstance(kept, Written) and list(kept.ids) == yes
    assert not isinstance(session._written("ye", yes), Written), "not what was shown"


def test_a_spelled_special_is_text_in_an_answer_too(model) -> None:
    spelled = "<|end|><|user|>"
    ids = model.tokenizer.encode(spelled)
    session = ChatSession(model, Settings(max_new_tokens=3))
    session.messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": session._written(spelled, ids)},
    ]
    list(session.ask(spelled))
    elements = model.template.render(Sample("s", session.messages[:3]), model.tokenizer, generation_prompt=True)
    special = {model.tokenizer.special(name): name for name in model.tokenizer.specials}
    structure = [special[token] for token in elements.ids.tolist() if token in special]
    turns = ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]
    assert structure == turns


def test_a_chat_grows_beyond_its_first_room(model) -> None:
    session = ChatSession(model, Settings(max_new_tokens=6))
    for turn, text in enumerate(["hi", "red green blue " * 300, "and?"], 1):
        list(session.ask(text))
        answer = session.messages[-1]["content"]
        assert list(getattr(answer, "ids", ())) == alone(model, session, turn)
    assert session.engine is not None and session.last is not None
    assert session.last.prompt_length > FIRST_ROOM and session.last.kept > FIRST_ROOM
    assert session.engine.pages.count >= session.last.prompt_length


def test_what_is_not_asked_for_takes_no_room(model) -> None:
    session = ChatSession(model, Settings(max_new_tokens=10**9))
    with closing(session.ask("hello")) as answer:
        next(answer)
    assert session.engine is not None and session.engine.pages.count == FIRST_ROOM


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_ctrl_c_frees_everything_and_the_chat_goes_on(model, at, monkeypatch) -> None:
    session = ChatSession(model, Settings(max_new_tokens=12))
    list(session.ask("what is it?"))
    engine, turns = session.engine, session.turns
    assert engine is not None
    calls, logits = [], model.logits

    def interrupted(hidden):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return logits(hidden)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "logits", interrupted)
        list(session.ask("and that?"))
    assert session.turns == turns + (at > 2), "what there was of the answer stays"
    assert (engine.pages.used, engine.running, list(engine.waiting)) == (0, [], []) and engine.pages.sound
    list(session.ask("go on"))
    assert session.engine is engine and session.last is not None and session.last.kept > 20
    assert list(session.messages[-1]["content"].ids) == alone(model, session, session.turns)


def test_ctrl_c_amid_the_bookkeeping_starts_over(model, monkeypatch) -> None:
    session = ChatSession(model, Settings(max_new_tokens=5))
    list(session.ask("what is it?"))
    before, calls, take = session.engine, [], Pages._take

    def interrupted(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pages, "_take", interrupted)
        list(session.ask("and that?"))
    list(session.ask("and that?"))
    assert session.engine is not before and session.last is not None and session.last.kept == 0
    assert list(session.messages[-1]["content"].ids) == alone(model, session, 2)


def test_closing_keeps_what_was_computed(model) -> None:
    session = ChatSession(model, Settings(max_new_tokens=30))
    with closing(session.ask("what is it?")) as answer:
        start = next(answer) + next(answer)
    assert session.engine is not None and session.engine.pages.used == 0
    assert session.messages[-1]["content"] == start and session.last is not None
    assert session.last.finish_reason is None
    seen = session.last.prompt_length + session.last.tokens - 1
    list(session.ask("go on"))
    assert session.last.kept == seen


def test_a_chat_that_was_loaded_goes_on_the_same(model, files, tmp_path) -> None:
    session = ChatSession(model, Settings(max_new_tokens=8))
    session.attach("image", files["cat.png"])
    list(session.ask("what is it?"))
    session.save(tmp_path / "chat.json")
    other = ChatSession(model, Settings(max_new_tokens=8))
    other.load(tmp_path / "chat.json")
    text = "".join(other.ask("why?"))
    sample = Sample("chat-turn-2", other.messages[:3], other.media)
    assert text == generate(model, [sample], 8)[0].text


def test_a_model_without_pages_says_so_and_reads_anew(model, monkeypatch) -> None:
    monkeypatch.setattr(model.decoder.rereader, "lengths", [16])
    session = ChatSession(model, Settings(max_new_tokens=4))
    assert session.rereads is not None and "LongRoPE" in session.rereads
    list(session.ask("a"))
    list(session.ask("b"))
    assert session.engine is None and session.last is not None and session.last.kept == 0


def test_settings_go_to_the_engine(model) -> None:
    session = ChatSession(model, Settings(max_new_tokens=4, max_length=30))
    with pytest.raises(ValueError, match="exceed the context of 30"):
        list(session.ask("a long story " * 20))
    assert session.turns == 0
    drawn = {
        "".join(ChatSession(model, replace(Settings(temperature=1.5, max_new_tokens=6), seed=s)).ask("a"))
        for s in range(4)
    }
    assert len(drawn) > 1
