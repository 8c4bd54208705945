"""Into the stream and out of it: scales, positions that are added, the norm behind them, caps on logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mm.decoder.embedding import Embedding, Head, LearnedPositions, SinusoidalPositions, TokenEmbedding
from mm.decoder.norms import LayerNorm
from mm.fusion.splice import splice
from mm.objectives.base import next_token_loss
from mm.testing import element_batch, finite_nonzero_gradients, tiny_decoder, tiny_model


def run(decoder, *rows, embeddings=None):
    batch = element_batch([[(1 + d, 0, str(i)) for d, ids in enumerate(row) for i in ids] for row in rows])
    sequence = splice(batch, decoder.embed, {}, nn.Embedding(3, decoder.width))
    if embeddings is not None:
        sequence.embeddings = embeddings(sequence.embeddings)
    return decoder(sequence)[0]


def test_the_scale_is_on_tokens_and_rounded_as_the_weights_are():
    plain, scaled = TokenEmbedding(9, 6), TokenEmbedding(9, 6, scale=math.sqrt(3072))
    scaled.load_state_dict(plain.state_dict())
    ids = torch.tensor([[1, 2], [8, 0]])
    torch.testing.assert_close(scaled(ids), plain(ids) * math.sqrt(3072))
    rounded = scaled.bfloat16()(ids)
    assert torch.equal(rounded, plain.bfloat16()(ids) * torch.tensor(55.5, dtype=torch.bfloat16))  # not 55.4256


def test_learned_positions_follow_the_document_and_stop_at_their_length():
    positions = LearnedPositions(4, 6, offset=2)
    nn.init.normal_(positions.weight)
    assert torch.equal(positions(torch.tensor([[0, 3]])), positions.weight[[2, 5]][None])
    with pytest.raises(ValueError, match="5 positions is longer than the 4"):
        positions(torch.tensor([[0, 4]]))
    assert positions(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 6)


def test_sinusoids_are_the_papers():
    table = SinusoidalPositions(6)(torch.tensor([[0, 1, 100]]))[0]
    for row, place in enumerate((0, 1, 100)):
        for i in range(3):
            angle = place / 10_000 ** (2 * i / 6)
            # the angle itself is rounded to float32, so that its sine is off by as much times the angle
            assert table[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    with pytest.raises(ValueError, match="even width, not 7"):
        SinusoidalPositions(7)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_added_positions_restart_with_each_document(kind):
    torch.manual_seed(0)
    options = Embedding(positions=kind, length=9 if kind == "learned" else None)
    decoder = tiny_decoder(embedding=options).eval()
    packed = run(decoder, [[4, 5, 6], [7, 8]])
    torch.testing.assert_close(packed[:, 3:], run(decoder, [[7, 8]]), atol=1e-5, rtol=1e-4)
    swapped = run(decoder, [[5, 4, 6]])
    assert (swapped[0, 2] - packed[0, 2]).abs().max() > 1e-2


def test_the_norm_stands_behind_the_sum_and_gradients_reach_all_of_it():
    torch.manual_seed(0)
    options = Embedding(scale=3.0, positions="learned", length=6, norm=LayerNorm)
    decoder = tiny_decoder(embedding=options, head=Head(bias=True))
    hidden = run(decoder, [list(range(1, 7))], [list(range(7, 13))])
    shifted = run(decoder, [list(range(1, 7))], embeddings=lambda x: x + 5.0)  # a LayerNorm takes a shift away
    torch.testing.assert_close(shifted[0], hidden[0], atol=1e-4, rtol=1e-4)
    run(decoder, *[[list(range(s, s + 6))] for s in range(1, 91, 6)])
    decoder.logits(run(decoder, *[[list(range(s, s + 6))] for s in range(1, 91, 6)])).square().mean().backward()
    finite_nonzero_gradients(decoder)


def test_logits_are_scaled_and_then_capped_in_float32():
    torch.manual_seed(0)
    decoder = tiny_decoder(head=Head(scale=0.5, softcap=2.0, bias=True), tie_embeddings=False)
    hidden = 5 * torch.randn(3, decoder.width)
    raw = hidden @ decoder.head.weight.t() + decoder.head.bias
    logits = decoder.logits(hidden)
    torch.testing.assert_close(logits, 2 * torch.tanh(0.5 * raw / 2), atol=1e-5, rtol=1e-5)
    assert logits.abs().max() < 2 and raw.abs().max() > 4
    assert decoder.bfloat16().logits(hidden.bfloat16()).dtype == torch.float32


def test_every_way_to_the_logits_applies_the_head_options():
    """The loss, the first forward pass of generation and each step after it: one cap for all."""
    torch.manual_seed(0)
    model = tiny_model().eval()
    ids = torch.randint(5, 90, (1, 7))
    before = model(input_ids=ids).logits
    model.decoder.head_options = Head(scale=0.3, softcap=0.5)
    output = model(input_ids=ids)
    torch.testing.assert_close(output.logits, 0.5 * torch.tanh(0.3 * before / 0.5))
    cache = model.new_cache()
    model(input_ids=ids[:, :-1], cache=cache)
    torch.testing.assert_close(model.step(ids[:, -1], cache), output.logits[:, -1], atol=1e-5, rtol=1e-4)
    output.sequence.labels[0, 3] = int(ids[0, 3])
    loss, _, _ = next_token_loss(output)
    torch.testing.assert_close(loss, -output.logits[0, 2].log_softmax(-1)[ids[0, 3]])


@pytest.mark.parametrize(
    "options,match",
    [
        ({"positions": "learned"}, "length is needed by learned"),
        ({"positions": "sinusoidal", "length": 4}, "length is needed by learned"),
        ({"offset": 2}, "offset 2 is for learned"),
    ],
)
def test_what_a_config_can_get_wrong(options, match):
    with pytest.raises(ValueError, match=match):
        Embedding(**options)
