"""Stop strings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.generation.engine import generate, generate_ids, stream
from mm.generation.options import Decoding
from mm.generation.stopping import Cutter, cut_before
from mm.generation.testing import ScriptedModel
from mm.model import MultimodalModel
from mm.testing import tiny_decoder


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_pieces_are_cut_as_the_whole_is(text: str, strings: list[str], data: st.DataObject) -> None:
    cutter, given_out, read = Cutter(strings), "", ""
    while len(read) < len(text) and not cutter.done:  # an answer ends with the piece that completes a stop string
        piece = text[len(read) : len(read) + data.draw(st.integers(1, len(text) - len(read)))]
        read += piece
        given_out += cutter.push(piece)
        assert cut_before(read, strings).startswith(given_out)
    given_out += cutter.flush()
    assert given_out == cut_before(read, strings)
    assert cutter.done == (len(given_out) < len(read))


@pytest.fixture
def scripted(tokenizer) -> ScriptedModel:
    return ScriptedModel(tokenizer, lambda sample: "one. två. ### three" if sample.key == "long" else "four")


def test_answers_end_before_a_stop_string(scripted, ask) -> None:
    samples = [ask("count", "long"), ask("count", "short")]
    options: Any = {"max_new_tokens": 60, "stop_strings": ["###", "å. x"]}
    long, short = generate(scripted, samples, **options)
    assert (long.text, long.finish_reason) == ("one. två. ", "stop")
    assert (short.text, short.finish_reason) == ("four", "stop")
    assert len(scripted.rows_per_step) < len("one. två. ### three")  # and nothing is decoded for nothing
    pieces = stream(scripted, samples[0], **options)
    assert "".join(pieces) == "one. två. " and pieces.finish_reason == "stop"
    whole, _ = generate(scripted, samples, max_new_tokens=60, stop_strings=["nowhere"])
    assert whole.text == "one. två. ### three"
    (cut,) = generate(scripted, samples[:1], max_new_tokens=3, stop_strings=["###"])
    assert cut.finish_reason == "length"


@pytest.fixture(scope="module")
def model(tokenizer) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size)).eval()


METHODS: list[Any] = [{}, {"num_beams": 2}, {"penalty_alpha": 0.4, "top_k": 3}, {"draft": "lookup"}]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_knows_them(model, method) -> None:
    ids, decode = torch.tensor([[50, 60, 70], [80, 90, 20]]), model.tokenizer.decode
    whole = generate_ids(model, ids, max_new_tokens=20, stop=[], pad_id=0, **method)
    string = max(decode(whole[0].tolist()), key=lambda letter: letter.isalpha())  # one that it would write
    ended = generate_ids(model, ids, max_new_tokens=20, stop=[], pad_id=0, stop_strings=[string], **method)
    for row in ended.tolist():
        written = [token for token in row if token]
        assert string not in decode(written[:-1])  # nothing goes on after it
        assert string in decode(written) or len(written) == 20
    if "num_beams" not in method:  # which may find better answers without it
        assert string in decode(ended[0].tolist())


@pytest.mark.parametrize(
    "options",
    [{"stop_strings": "abc"}, {"stop_strings": [""]}, {"logprobs": -1}, {"logprobs": True}],
)
def test_nonsense_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="stop_strings|logprobs"):
        Decoding(**options)
