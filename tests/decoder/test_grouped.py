"""Grouped attention's options, each against a few lines of its own; decoders that mix them by a pattern."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.attention.grouped import GroupedAttention, QKNorm, Scores
from mm.decoder.attention.windows import LocalGlobal, StreamingSinks
from mm.decoder.decoder import Block, Decoder, LayerGroup
from mm.decoder.embedding import Embedding
from mm.decoder.ffn.dense import ClampedFFN, GatedFFN, PlainFFN, activation
from mm.decoder.layout import Layout, Places
from mm.decoder.norms import LayerNorm, RMSNorm
from mm.decoder.positions import Alibi, RopeScaling, Rotary
from mm.fusion.splice import splice
from mm.testing import element_batch, finite_nonzero_gradients, tiny_decoder

B, T, D = 2, 7, 12
DEFAULTS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "positions": None}


def close(actual: Tensor, expected: Tensor) -> None:
    """float32 sums of tens of terms in another order: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def layout() -> Layout:
    index = torch.arange(T).expand(B, T)
    places = Places(index, torch.ones_like(index), torch.zeros_like(index))
    return Layout(places, places, index[..., None].expand(B, T, 3))


def make(**options) -> GroupedAttention:
    torch.manual_seed(0)
    attention = GroupedAttention(D, **(DEFAULTS | options))
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def written_out(attention: GroupedAttention, x: Tensor, change=lambda q, k, v: (q, k, v), scale: float = 3**-0.5):
    """softmax(q k^T) v over causal keys, four heads of three numbers, before the output matrix."""
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).unflatten(-1, (8, 3)).split([4, 2, 2], 2)
    q, k, v = change(q, k, v)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * scale
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(2, 2)).flatten(2)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias,out_bias", [(False, None), (True, None), (True, False), (False, True)])
def test_biases_stand_where_they_are_asked_for(x, bias, out_bias):
    attention = make(bias=bias, out_bias=out_bias)
    assert (attention.qkv.bias is not None) == bias
    assert (attention.out.bias is not None) == (bias if out_bias is None else out_bias)
    close(attention(x, layout()), attention.out(written_out(attention, x)))


def test_the_scale_is_replaced(x):
    attention = make(scores=Scores(scale=0.1))
    close(attention(x, layout()), attention.out(written_out(attention, x, scale=0.1)))


@pytest.mark.parametrize("kind", ["head", "full", "head_layer"])
def test_queries_and_keys_are_normalised_and_then_clipped(x, kind):
    attention = make(qk_norm=QKNorm(kind, eps=0.1), clip_qkv=0.8)

    def change(q, k, v):
        q, k = attention.q_norm(q), attention.k_norm(k)
        assert q.abs().max() > 0.8 and v.abs().max() > 0.8  # or nothing would be clipped
        return tuple(part.clamp(-0.8, 0.8) for part in (q, k, v))

    close(attention(x, layout()), attention.out(written_out(attention, x, change)))
    shapes = {"head": [(3,), (3,)], "full": [(12,), (6,)], "head_layer": [(4, 3), (2, 3)]}[kind]
    assert [norm.get_parameter("weight").shape for norm in (attention.q_norm, attention.k_norm)] == shapes
    assert vars(attention.q_norm)["eps"] == 0.1


@pytest.mark.parametrize("kind,numbers", [("element", 12), ("head", 4)])
def test_the_gate_multiplies_before_the_output_matrix(x, kind, numbers):
    attention = make(gate=kind)
    assert attention.gate is not None and attention.gate.weight.shape == (numbers, D)
    gate = torch.sigmoid(x @ attention.gate.weight.t())
    if kind == "head":
        gate = gate.repeat_interleave(3, -1)
    close(attention(x, layout()), attention.out(gate * written_out(attention, x)))


def test_a_sink_takes_weight_away_and_learns(x):
    attention = make(scores=Scores(sinks=True))
    assert attention.sinks is not None
    nn.init.constant_(attention.sinks, -1e4)
    without = attention(x, layout())
    close(without, attention.out(written_out(attention, x)))
    nn.init.constant_(attention.sinks, 1e4)
    assert attention(x, layout()).abs().max() < 1e-6  # all attention goes to nothing
    nn.init.zeros_(attention.sinks)
    attention(x, layout()).square().sum().backward()
    finite_nonzero_gradients(attention)


def test_flops_and_cache_follow_heads_and_window():
    assert make(head_dim=5).cache_numbers_per_token() == 2 * 2 * 5
    assert make().attention_flops(100) == 4 * 4 * 3 * 100
    assert make(window=10).attention_flops(100) == 4 * 4 * 3 * 10
    assert make(window=StreamingSinks(4, 8)).attention_flops(100) == 4 * 4 * 3 * 12
    assert make(window=LocalGlobal(10, 10)).attention_flops(100) == 4 * 4 * 3 * (10 + 9)


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_sees_at_least_its_own_place(window):
    with pytest.raises(ValueError, match=f"window {window} must be at least 1"):
        make(window=window)


ACTIVATIONS: dict[Any, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
}


def test_gated_and_plain_parts_are_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(5, D)
    for name, act in ACTIVATIONS.items():
        gated = GatedFFN(D, 9, name, bias=True)
        gate, up = gated.gate_up(x).chunk(2, -1)
        close(gated(x), gated.down(act(gate) * up))
        plain = PlainFFN(D, 9, name)
        close(plain(x), plain.down(act(plain.up(x))))
    with pytest.raises(ValueError, match="'tanh' is not one of silu, gelu"):
        activation("tanh")


def test_the_clamped_part_is_gpt_oss_s():
    """Against the expert of the reference implementation's model, whose gate and values alternate."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    torch.manual_seed(0)
    theirs = GptOssExperts(GptOssConfig(hidden_size=D, intermediate_size=9, num_local_experts=1, num_experts_per_tok=1))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=2.0)  # so that both limits bite
    ours = ClampedFFN(D, 9)
    with torch.no_grad():
        gate_up, bias = theirs.gate_up_proj[0].t(), theirs.gate_up_proj_bias[0]
        ours.gate_up.weight.copy_(torch.cat([gate_up[::2], gate_up[1::2]]))
        ours.gate_up.bias.copy_(torch.cat([bias[::2], bias[1::2]]))
        ours.down.weight.copy_(theirs.down_proj[0].t())
        ours.down.bias.copy_(theirs.down_proj_bias[0])
        x = torch.randn(5, D)
        gate, up = ours.gate_up(x).chunk(2, -1)
        assert gate.max() > 7 and up.abs().max() > 7
        expected = theirs(x, torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
        torch.testing.assert_close(ours(x), expected.view_as(x), atol=1e-3, rtol=1e-5)  # values reach 1000


# --- whole decoders ------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "gpt3": {
        "mixers": {
            "full": partial(GroupedAttention, heads=4, positions=None, bias=True),
            "local": partial(GroupedAttention, heads=4, positions=None, bias=True, window=2),
        },
        "ffns": {"f": partial(PlainFFN, hidden=40)},
        "layers": [LayerGroup(["full/f", "local/f"], 2)],
        "block": Block(LayerNorm),
        "embedding": Embedding(positions="learned", length=16),
    },
    "smollm3": {  # every fourth layer has no positions
        "mixers": {
            "rope": partial(GroupedAttention, heads=4, kv_heads=2),
            "nope": partial(GroupedAttention, heads=4, kv_heads=2, positions=None),
        },
        "ffns": {"f": partial(GatedFFN, hidden=40)},
        "layers": [LayerGroup(["rope/f", "rope/f", "rope/f", "nope/f"])],
    },
    "olmo2": {
        "mixers": {"full": partial(GroupedAttention, heads=4, qk_norm=QKNorm("full"))},
        "ffns": {"f": partial(GatedFFN, hidden=40)},
        "layers": [LayerGroup(["full/f"], 2)],
        "block": Block(partial(RMSNorm, eps=1e-5), "post"),
    },
    "longrope_in_one_of_two": {
        "mixers": {
            "long": partial(
                GroupedAttention,
                heads=4,
                positions=Rotary(
                    scaling=RopeScaling("longrope", 2.0, 5, short_factor=(1.0,) * 4, long_factor=(3.0,) * 4)
                ),
            ),
            "alibi": partial(GroupedAttention, heads=4, positions=Alibi()),
        },
        "ffns": {"f": partial(GatedFFN, hidden=40)},
        "layers": [LayerGroup(["long/f", "alibi/none"], 2)],
        "block": Block(arrangement="sandwich", residual_scale=0.5),
    },
}


def run(decoder: Decoder, rows: list[list[int]], cache=None, past: list[int] | None = None) -> Tensor:
    """Rows of ids, 0 being padding, that go on after `past` positions."""
    batch = element_batch([[(int(token > 0), 0, str(token)) for token in row] for row in rows])
    sequence = splice(batch, decoder.embed, {}, nn.Embedding(3, decoder.width))
    if past is not None:
        sequence.index += torch.tensor(past)[:, None]
        sequence.positions += torch.tensor(past)[:, None, None]
    return decoder(sequence, cache)[0]


def made(options) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(32, vocab_size=97, **options)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return decoder


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_ragged_rows_decode_step_by_step_as_each_would_alone(name):
    """Rows of different lengths, padded on either side, each step the last position of the row's own full pass: also
    where some rows pass a length at which frequencies switch, in the prompt or while they are decoded."""
    decoder = made(PUBLISHED[name]).eval()
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]
    for left in (True, False):
        padding = [[0] * (7 - len(row)) for row in rows]
        cache, texts = decoder.new_cache(), [list(row) for row in rows]
        run(decoder, [p + r if left else r + p for p, r in zip(padding, rows, strict=True)], cache)
        for step in range(5):
            past = [len(text) for text in texts]
            hidden = run(decoder, [[20 + step]] * 3, cache, past)
            for row, text in enumerate(texts):
                text.append(20 + step)
                close(hidden[row, -1], run(decoder, [text])[0, -1])
        cache.keep(torch.tensor([2]))
        close(run(decoder, [[30]], cache, [7])[0, -1], run(decoder, [[*texts[2], 30]])[0, -1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradients_reach_every_weight(name):
    decoder = made(PUBLISHED[name])
    decoder.logits(run(decoder, [list(range(s, s + 10)) for s in range(1, 91, 10)])).square().mean().backward()
    finite_nonzero_gradients(decoder)


def test_inputs_are_kept_only_while_a_switch_is_ahead():
    """And only by a decoder that switches: what they cost is width numbers a token."""
    decoder = made(PUBLISHED["longrope_in_one_of_two"]).eval()
    cache = decoder.new_cache()
    for position in range(8):
        run(decoder, [[5 + position]], cache, [position])
        kept = cache.layers[-1].get("inputs")
        assert (kept is None) == (position + 1 > 5), position
    assert len(tiny_decoder(layers=2).new_cache().layers) == 2


@torch.no_grad()
def test_a_long_row_that_is_read_again_is_one_document(monkeypatch):
    """Its padding lay between the prompt and what was decoded; long rows are attended to document by document."""
    from mm.decoder.attention.backends import sdpa

    monkeypatch.setattr(sdpa, "BLOCK", 2)
    decoder = made(PUBLISHED["longrope_in_one_of_two"]).eval()
    cache = decoder.new_cache()
    run(decoder, [[5, 6, 7, 8], [9, 10, 0, 0]], cache)
    texts = [[5, 6, 7, 8], [9, 10]]
    for step in range(4):
        hidden = run(decoder, [[20 + step]] * 2, cache, [len(text) for text in texts])
        for row, text in enumerate(texts):
            text.append(20 + step)
            close(hidden[row, -1], run(decoder, [text])[0, -1])
