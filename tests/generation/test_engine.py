"""The decoding loop on a recurrent model (numbers) and on a scripted one (texts)."""

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.generation import generate, generate_ids, stream
from mm.generation.requests import Request, batches, pad_right, request_generator
from mm.generation.testing import ScriptedModel
from mm.types import Media, MediaError, Sample

SAMPLED = {"temperature": 1.0, "top_k": 40, "top_p": 0.95}


@pytest.fixture
def samples(ask):
    """Of different lengths, with and without images; the longest neither first nor last."""
    texts = ["red?", "what colour is the shape?", "is it blue? " * 9, "", "green or red"]
    images = [3, None, None, 7, 4]
    return [ask(text, f"q{i}", image) for i, (text, image) in enumerate(zip(texts, images, strict=True))]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [{"batch_size": 2}, {"batch_tokens": 150}, {}], ids=["pairs", "budget", "all"])
def test_a_request_gets_in_a_batch_what_it_gets_alone(model, samples, options, batch):
    alone = [generate(model, [sample], max_new_tokens=12, **options)[0] for sample in samples]
    together = generate(model, samples, max_new_tokens=12, **options, **batch)
    assert together == alone
    assert len({tuple(answer.ids) for answer in together}) > 3  # the prompts matter, or this test could not fail
    backwards = generate(model, samples[::-1], max_new_tokens=12, **options, **batch)
    assert backwards == alone[::-1]


def test_the_image_matters(model, ask):
    first, second, same = generate(model, [ask("?", image=1), ask("?", image=2), ask("?", image=1)], max_new_tokens=8)
    assert first.ids == same.ids != second.ids


def test_seeds(model, ask):
    chats = [ask("red?", f"q{i}") for i in range(4)]
    drawn = [answer.ids for answer in generate(model, chats, 10, temperature=1.0, seed=1)]
    assert len({tuple(ids) for ids in drawn}) == 4  # one seed for all: still every request its own numbers
    assert drawn == [answer.ids for answer in generate(model, chats, 10, temperature=1.0, seed=1)]
    assert drawn != [answer.ids for answer in generate(model, chats, 10, temperature=1.0, seed=2)]
    assert [a.ids for a in generate(model, chats[2:], 10, temperature=1.0, seed=1)] == drawn[2:]
    own = [answer.ids for answer in generate(model, chats, 10, temperature=1.0, seed=[5, 6, 5, 7])]
    assert own[0] == own[2] != own[1]


def test_stop_and_length(tokenizer, ask):
    model = ScriptedModel(tokenizer, lambda sample: {"a": "red", "b": "", "c": "blue " * 20}[sample.key])
    red, nothing, cut = generate(model, [ask("?", key) for key in "abc"], max_new_tokens=10)
    assert (red.text, red.finish_reason) == ("red", "stop")
    assert (nothing.text, nothing.ids, nothing.finish_reason) == ("", [], "stop")
    assert cut.finish_reason == "length"
    assert len(cut.ids) == 10
    assert cut.text == tokenizer.decode(cut.ids)


def test_a_stop_at_the_very_last_token_is_a_stop(tokenizer, ask):
    model = ScriptedModel(tokenizer, lambda sample: "red, green or blue")
    tokens = len(tokenizer.encode("red, green or blue"))
    assert generate(model, [ask("?")], max_new_tokens=tokens + 1)[0].finish_reason == "stop"
    assert generate(model, [ask("?")], max_new_tokens=tokens)[0].finish_reason == "length"


def test_rows_that_ended_are_not_computed(tokenizer, ask):
    answers = {"a": "", "b": "!!!", "c": "!"}  # one token each sign
    model = ScriptedModel(tokenizer, lambda sample: answers[sample.key])
    lengths = {key: len(tokenizer.encode(text)) for key, text in answers.items()}
    generate(model, [ask("?", key) for key in "abc"], max_new_tokens=10)
    expected = [sum(length >= step for length in lengths.values()) for step in range(1, max(lengths.values()) + 1)]
    assert model.rows_per_step == expected


def test_the_list_is_read_as_it_is_needed(tokenizer, ask):
    model = ScriptedModel(tokenizer, lambda sample: sample.key)
    read, done = [], []

    def source():
        for i in range(50):
            read.append(i)
            yield ask("?", f"q{i}")

    def progress(count):
        done.append(count)
        assert len(read) <= sum(done) + 8 * 2

    answers = generate(model, source(), batch_size=2, progress=progress)
    assert [answer.text for answer in answers] == [f"q{i}" for i in range(50)]
    assert sum(done) == 50


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 200))
def test_batches_hold_every_request_once_within_the_budget(lengths, batch_size, batch_tokens):
    class Length:
        def __init__(self, length):
            self.length = length

    requests = [Request(i, "", Length(n), torch.Generator()) for i, n in enumerate(lengths)]  # type: ignore[arg-type]
    made = list(batches(requests, batch_size, batch_tokens, max_new_tokens=3))
    assert sorted(request.index for batch in made for request in batch) == list(range(len(lengths)))
    for batch in made:
        width = max(request.encoded.length for request in batch) + 3
        assert len(batch) == 1 or (len(batch) <= batch_size and len(batch) * width <= batch_tokens)


def test_nan_logits_name_the_request(model, samples):
    with torch.no_grad():
        model.embed[model.tokenizer.encode(" blue")[-1]] = torch.nan  # only one prompt has it
    with pytest.raises(ValueError, match="^sample q2: .* token 1 .*NaN"):
        generate(model, samples, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": -5}, "max_new_tokens=-5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"seed": [1]}, "seed: 1 numbers"),
        ({"max_length": 20}, "sample q1: a prompt of .* exceed the context of 20"),
    ],
)
def test_nonsense_options_are_one_clear_error(model, ask, options: dict[str, Any], message):
    options = {"max_new_tokens": 5, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, [ask("a", "q0"), ask("what colour is the shape?" * 3, "q1")], **options)


def test_nonsense_prompts_are_one_clear_error(model, ask):
    answered = Sample("done", [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}])
    branches = Sample("many", [{"role": "user", "content": "?"}], branches=[[{"role": "user", "content": "?"}]])
    for sample, message in (
        (Sample("none", []), "none: the prompt is empty"),
        (Sample("blank", [{"role": "user", "content": ""}]), "blank: the prompt is empty"),
        (answered, "sample done: the last message is the assistant's"),
        (branches, "sample many: .*branches"),
        (
            Sample("a", [{"role": "user", "content": [{"type": "audio", "media": 0}]}], [Media("audio", b"", "x.wav")]),
            "audio",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, [sample])
    broken = Sample(
        "b", [{"role": "user", "content": [{"type": "image", "media": 0}]}], [Media("image", b"GIF", "x.gif")]
    )
    with pytest.raises(MediaError, match=r"x\.gif"):
        generate(model, [broken])
    with pytest.raises(ValueError, match="eval"):
        generate(model.train(), [ask("?")])


def test_no_samples_no_answers(model):
    assert generate(model, []) == []


# --- stream ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_stream_gives_what_generate_gives(model, samples, options):
    for sample, answer in zip(samples, generate(model, samples, 12, **options), strict=True):
        pieces = stream(model, sample, max_new_tokens=12, **options)
        assert pieces.finish_reason is None
        assert "".join(pieces) == answer.text
        assert (pieces.ids, pieces.finish_reason) == (answer.ids, answer.finish_reason)
        assert pieces.prompt_length == answer.prompt_length


def test_stream_never_splits_a_character(tokenizer, ask):
    text = "é 漢字 🙂 e\u0301 red"
    assert len(tokenizer.encode("🙂")) > 1  # several tokens a character, or this test could not fail
    model = ScriptedModel(tokenizer, lambda sample: text)
    pieces = list(stream(model, ask("?")))
    assert "".join(pieces) == text
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer, ask):
    model = ScriptedModel(tokenizer, lambda sample: "a🙂")
    answer = generate(model, [ask("?")], max_new_tokens=2)[0]
    assert "".join(stream(model, ask("?"), max_new_tokens=2)) == answer.text
    assert answer.text.startswith("a\ufffd")


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_stopped_stream_frees_its_cache(model, ask, how, monkeypatch):
    caches = []
    make = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda: caches.append(weakref.ref(cache := make())) or cache)
    pieces = stream(model, ask("red?"), max_new_tokens=200)
    next(pieces)
    assert caches[0]() is not None
    if how == "close":
        pieces.close()
        assert list(pieces) == []
        assert pieces.finish_reason is None
    else:
        del pieces
        gc.collect()
    assert caches[0]() is None


def test_stream_complains_before_the_first_piece(model, ask):
    wrong: list[Any] = [{"max_new_tokens": 0}, {"top_k": 0}, {"max_length": 3}, {"num_beams": 2}]
    for options in wrong:
        with pytest.raises(ValueError):
            stream(model, ask("red?"), **options)


def test_gradients_stay_possible_around_a_stream(model, ask):
    pieces = stream(model, ask("red?"), max_new_tokens=50)
    next(pieces)
    loss = (model.embed * 2).sum()  # between two pieces, inference mode is off
    loss.backward()
    assert model.embed.grad is not None


# --- generate_ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_padding_on_either_side_or_none(model, options):
    a, b = [20, 30, 40, 50, 60], [70, 80]
    seeds = [3, 4]
    right, left = torch.tensor([a, [*b, 0, 0, 0]]), torch.tensor([a, [0, 0, 0, *b]])
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    first = generate_ids(model, right, mask, 9, stop=(), seed=seeds, **options)
    second = generate_ids(model, left, mask.flip(1), 9, stop=(), seed=seeds, **options)
    alone = [
        generate_ids(model, torch.tensor([row]), None, 9, stop=(), seed=[seed], **options)[0]
        for row, seed in zip((a, b), seeds, strict=True)
    ]
    assert first.shape == (2, 9)
    assert torch.equal(first, second)
    assert torch.equal(first, torch.stack(alone))


def test_rows_end_with_their_stop_id_and_are_padded(model):
    ids = torch.tensor([[20, 30], [70, 80]])
    free = generate_ids(model, ids, max_new_tokens=8, stop=())
    stop = int(free[0, 2])
    assert stop not in free[0, :2] and stop not in free[1]
    stopped = generate_ids(model, ids, max_new_tokens=8, stop=[stop], pad_id=-7)
    assert stopped[0].tolist() == [*free[0, :3].tolist(), *[-7] * 5]
    assert torch.equal(stopped[1], free[1])
    assert generate_ids(model, ids[:1], max_new_tokens=8, stop=[stop]).shape == (1, 3)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]), "row 1 of input_ids is empty"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "row 0 of input_ids is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), None, "no rows"),
        (torch.zeros(3, dtype=torch.int64), None, "shape"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 2), "attention_mask"),
    ],
)
def test_ids_without_a_prompt(model, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        generate_ids(model, ids, mask)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=4))
def test_pad_right_keeps_the_real_tokens_in_order(mask):
    ids = torch.arange(len(mask) * 5).view(-1, 5) + 1
    padded, real = pad_right(ids, torch.tensor(mask))
    for before, keep, after, valid in zip(ids, torch.tensor(mask), padded, real, strict=True):
        assert after[valid].tolist() == before[keep].tolist()
        assert valid.tolist() == sorted(valid.tolist(), reverse=True)


def test_request_seeds_do_not_depend_on_the_process():
    # Written down: Python's hash() would give another number in every process.
    assert request_generator(0, 0, "q").initial_seed() == request_generator(0, 9, "q").initial_seed()
    assert request_generator(0, 0, "q").initial_seed() % 2**64 == 16182860315605178697
