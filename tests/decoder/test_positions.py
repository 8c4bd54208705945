"""Every RoPE scaling against transformers' own tables, both pairings, LongRoPE's switch, ALiBi, the mixture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.layout import Layout, Places
from mm.decoder.positions import Alibi, RopeScaling, Rotary, RotaryAlibi, alibi_slopes, inverse_frequencies

DIM, THETA = 24, 10_000.0
FACTORS: dict[str, Any] = {
    "short_factor": tuple(1.0 + 0.1 * i for i in range(DIM // 2)),
    "long_factor": tuple(1.5 + 0.5 * i for i in range(DIM // 2)),
}
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def layout_of(index: Tensor, documents: Tensor | None = None, past: int = 0) -> Layout:
    """Rows of places; the first `past` columns are keys that are cached already."""
    documents = torch.ones_like(index) if documents is None else documents
    keys = Places(index, documents, torch.zeros_like(index))
    queries = Places(*(x[:, past:] for x in (keys.index, keys.document_ids, keys.branch_ids)))
    return Layout(queries, keys, queries.index[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_is_turned_and_its_gradient_are_the_formula_s(pairs, fraction):
    """As complex numbers in float64; the way without gradients is held to the same."""
    torch.manual_seed(0)
    rotary, layout = Rotary(theta=100.0, pairs=pairs, fraction=fraction), layout_of(torch.arange(6)[None] + 3)
    x, grad = torch.randn(1, 6, 2, 8, requires_grad=True), torch.randn(1, 6, 2, 8)
    turned = rotary.turn(x, layout)
    turned.backward(grad)

    def formula(given: Tensor) -> Tensor:
        half = rotary.rotated(8) // 2
        angles = (torch.arange(6.0)[:, None] + 3) * inverse_frequencies(2 * half, 100.0)
        turning, rest = given[..., : 2 * half], given[..., 2 * half :]
        split = (
            turning.unflatten(-1, (2, half)).transpose(-1, -2)
            if pairs == "halves"
            else turning.unflatten(-1, (half, 2))
        )
        numbers = torch.view_as_real(
            torch.view_as_complex(split.contiguous()) * torch.exp(1j * angles[:, None].double())
        )
        numbers = numbers.transpose(-1, -2) if pairs == "halves" else numbers
        return torch.cat([numbers.flatten(-2), rest], -1)

    big = x.detach().double().requires_grad_()
    wanted = formula(big)
    wanted.backward(grad.double())
    assert x.grad is not None and big.grad is not None
    for found, exact in ((turned, wanted), (rotary.turn(x.detach(), layout), wanted), (x.grad, big.grad)):
        torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-6)  # float32's angles, a few roundings


@pytest.mark.parametrize(
    "kind,options",
    [
        ("linear", {"factor": 3.0}),
        ("yarn", {"factor": 4.0, "original_length": 64}),
        ("yarn", {"factor": 4.0, "original_length": 64, "truncate": False}),
        (
            "yarn",
            {"factor": 40.0, "original_length": 512, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        ),
        ("yarn", {"factor": 40.0, "original_length": 512, "mscale": 1.0, "mscale_all_dim": 0.5}),
        ("yarn", {"factor": 40.0, "original_length": 512, "mscale": 0.7}),  # one of the two alone changes nothing
        ("yarn", {"factor": 0.5, "original_length": 512}),
        ("llama3", dict(factor=8.0, original_length=64, **LLAMA3)),
        ("longrope", dict(factor=4.0, original_length=64, **FACTORS)),
        ("longrope", dict(factor=4.0, original_length=64, attention_factor=1.2, **FACTORS)),
        ("longrope", dict(factor=1.0, original_length=64, **FACTORS)),
    ],
)
def test_scalings_are_transformers(kind, options):
    scaling = RopeScaling(kind, **options)
    theirs = {{"original_length": "original_max_position_embeddings"}.get(k, k): v for k, v in options.items()}
    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    config = LlamaConfig(
        head_dim=DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": THETA, **theirs},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    ours, our_factor = scaling.apply(DIM, THETA)
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)  # one or two roundings apart
    assert our_factor == pytest.approx(factor)
    if kind == "longrope":
        long, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=65)
        found = scaling.long_frequencies(DIM, THETA)
        assert found is not None
        torch.testing.assert_close(found, long, rtol=1e-6, atol=0)
    else:
        assert scaling.long_frequencies(DIM, THETA) is None


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_factor():
    base, scaled = inverse_frequencies(DIM, THETA), RopeScaling("ntk", 4.0).apply(DIM, THETA)[0]
    assert scaled[0] == base[0] and scaled[-1] == pytest.approx(float(base[-1] / 4))


@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_is_multiplication_by_a_complex_number(pairs, fraction):
    torch.manual_seed(0)
    layout = layout_of(torch.tensor([[0, 1, 5, 90]]))
    x = torch.randn(1, 4, 3, 12, dtype=torch.float64)
    rotary = Rotary(theta=100.0, pairs=pairs, fraction=fraction)
    turned = rotary.turn(x, layout)
    dim = int(12 * fraction)
    first, second = (
        (slice(0, dim // 2), slice(dim // 2, dim)) if pairs == "halves" else (slice(0, dim, 2), slice(1, dim, 2))
    )
    angle = layout.queries.index[0, :, None, None].double() * 100.0 ** (-torch.arange(0, dim, 2).double() / dim)
    expected = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angle), angle)
    # the tables are float32: an angle of up to 90 is off by 90 * 6e-8
    torch.testing.assert_close(turned[..., first], expected.real, atol=2e-5, rtol=0)
    torch.testing.assert_close(turned[..., second], expected.imag, atol=2e-5, rtol=0)
    assert torch.equal(turned[..., dim:], x[..., dim:])


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8).expand(1, 40, 1, 8), torch.randn(1, 1, 1, 8).expand(1, 40, 1, 8)
    layout = layout_of(torch.arange(40)[None])
    for rotary in (Rotary(theta=50.0), Rotary(theta=50.0, pairs="adjacent")):
        turned_q, turned_k = rotary.rotate(q, k, layout)
        scores = turned_q[0, :, 0] @ turned_k[0, :, 0].t()
        for distance in (0, 3, 17):
            line = scores.diagonal(-distance)
            torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-4, rtol=1e-4)
        assert (scores.diagonal(-3)[0] - scores.diagonal(-17)[0]).abs() > 1e-2


def test_each_document_switches_by_its_own_length():
    """Not by its neighbours', and not by the width of the batch: packing and batch order change nothing."""
    scaling = RopeScaling("longrope", 2.0, original_length=4, short_factor=[1.0, 1.0], long_factor=[2.0, 4.0])  # type: ignore[arg-type]
    rotary = Rotary(theta=100.0, scaling=scaling)
    index = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 0, 0, 0, 0, 0, 0, 1, 2, 3]])
    documents = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    cos, _ = rotary.tables(layout_of(index, documents), 4)
    factor = math.sqrt(1 + math.log(2) / math.log(4))
    short, long = inverse_frequencies(4, 100.0), inverse_frequencies(4, 100.0) / torch.tensor([2.0, 4.0])
    for row, places, frequencies in (
        (0, slice(0, 5), long),
        (0, slice(5, 9), short),
        (1, slice(6, 10), short),
    ):
        expected = (index[row, places, None] * frequencies).cos() * factor
        torch.testing.assert_close(cos[row, places, 0], expected)
    longer = layout_of(torch.arange(5)[None], past=4)  # decoding: the cached places count
    assert longer.document_lengths().tolist() == [[5]]
    assert Rotary().switches_at is None and rotary.switches_at == 4
    assert RotaryAlibi(2, rotary).switches_at == 4


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12])
def test_slopes_are_blooms_and_mpts(heads):
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    ours = alibi_slopes(heads)
    torch.testing.assert_close(ours, bloom)
    torch.testing.assert_close(ours, mpt)
    torch.testing.assert_close(alibi_slopes(heads, 6.0), -build_mpt_alibi_tensor(heads, 2, alibi_bias_max=6)[:, 0, 0])


def test_a_mixtures_rotary_heads_have_no_slope():
    assert Alibi().slopes(2, torch.device("cpu")).tolist() == [2**-4, 2**-8]
    assert RotaryAlibi(4).slopes(6, torch.device("cpu")).tolist() == [0, 0, 0, 0, 2**-4, 2**-8]


def test_a_mixture_is_rotary_in_its_first_heads_and_alibi_in_the_rest():
    torch.manual_seed(0)
    layout, x = layout_of(torch.arange(9)[None]), torch.randn(1, 9, 24)
    mixture = RotaryAlibi(4, Rotary(theta=100.0))
    outs = {}
    for name, heads, positions in (("mixed", 6, mixture), ("rotary", 4, Rotary(theta=100.0)), ("alibi", 2, Alibi())):
        attention = GroupedAttention(24, heads=heads, kv_heads=heads // 2, head_dim=4, positions=positions)
        outs[name] = attention
    mixed = outs["mixed"]
    q, k, v = mixed.qkv.weight.split([24, 12, 12])
    parts = {"rotary": (slice(0, 16), slice(0, 8)), "alibi": (slice(16, 24), slice(8, 12))}
    total = torch.zeros(1, 9, 24)
    for name, (of_q, of_kv) in parts.items():
        outs[name].qkv.weight.data = torch.cat([q[of_q], k[of_kv], v[of_kv]]).detach()
        outs[name].out.weight.data = mixed.out.weight[:, of_q].detach()
        total = total + outs[name](x, layout)
    torch.testing.assert_close(mixed(x, layout), total, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: RopeScaling("linear", 0.0), "factor must be positive"),
        (lambda: RopeScaling("yarn", 2.0, original_length=0), "original_length"),
        (lambda: RopeScaling("longrope", 2.0), "short_factor is needed by longrope"),
        (lambda: RopeScaling("yarn", 2.0, long_factor=(1.0,)), "long_factor is needed by longrope, and by longrope"),
        (lambda: RopeScaling("longrope", 2.0, **FACTORS).apply(8, THETA), "short_factor has 12 numbers; .* are 4"),
        (lambda: Rotary(fraction=0.5).rotated(6), "is 3 numbers"),
        (lambda: Rotary(fraction=2.0).rotated(6), "is 12 numbers"),
        (
            lambda: RotaryAlibi(3).rotate(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 2, 2), layout_of(torch.zeros(1, 1))),
            "3",
        ),
        (
            lambda: RotaryAlibi(4).rotate(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), layout_of(torch.zeros(1, 1))),
            "4",
        ),
    ],
)
def test_what_a_config_can_get_wrong(make, match):
    with pytest.raises(ValueError, match=match):
        make()
