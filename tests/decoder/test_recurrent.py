"""Recurrent mixers, linear attention and Mamba-2: everything that must not leak or be lost."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.attention.linear import LinearAttention
from mm.decoder.attention.ssm import GatedGroupNorm, Mamba2
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.layout import Layout, Places
from mm.fusion.splice import splice
from mm.testing import element_batch, finite_nonzero_gradients, tiny_decoder
from mm.types import Batch

MIXERS: dict[str, Any] = {
    "mamba2": partial(Mamba2, heads=6, head_dim=8, state=5, groups=3, chunk=4),
    "mamba2 biased": partial(Mamba2, heads=4, head_dim=16, state=7, groups=1, chunk=3, bias=True, conv_bias=False),
    "mamba2 without convolution": partial(Mamba2, heads=2, head_dim=8, state=3, conv=1, chunk=64),
    "linear": partial(LinearAttention, heads=4, chunk=3),
    "linear relu": partial(LinearAttention, heads=2, head_dim=5, feature="relu", chunk=64, bias=True),
    "linear sums": partial(LinearAttention, heads=4, normalise=False, feature="softplus", chunk=2),
}


def close(actual: Tensor, expected: Tensor, what: str | None = None) -> None:
    """float32 sums of tens of terms in another order: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=what)


def text(*rows: str) -> Batch:
    """Rows like "1:5 1:6 2:7" or "1.2:8" (document, branch, id); "0:0" is padding."""

    def element(word: str) -> tuple[int, int, str]:
        place, token = word.split(":")
        document, _, branch = place.partition(".")
        return int(document), int(branch or 0), token

    return element_batch([[element(word) for word in row.split()] for row in rows])


def run(decoder: Decoder, batch: Batch, cache: Any = None) -> Tensor:
    sequence = splice(batch, decoder.embed, {}, nn.Embedding(3, decoder.width))
    return decoder(sequence, cache)[0]


def one_document(length: int) -> Layout:
    ones = torch.ones(1, length, dtype=torch.long)
    places = Places(torch.arange(length)[None], ones, torch.zeros_like(ones))
    return Layout(places, places, places.index[..., None].expand(-1, -1, 3))


def decoder_with(mixer: str, **options: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = tiny_decoder(mixer=MIXERS[mixer], **options).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith(("dt_bias", "skip", "conv.bias")):  # as they start, little fades within a few positions
            nn.init.normal_(parameter)
    return decoder


@pytest.mark.parametrize("mixer", MIXERS)
def test_packing_branches_and_padding_never_leak(mixer: str) -> None:
    decoder = decoder_with(mixer)
    alone = run(decoder, text("1:5 1:6 1:7 1:8 1:9"))[0]
    packed = run(decoder, text("1:30 1:31 1:32 2:5 2:6 2:7 2:8 2:9 3:40", "1:5 1:6 1:7 1:8 1:9"))
    close(packed[0, 3:8], alone)
    close(packed[1, :5], alone)
    moved = run(decoder, text("1:33 1:34 1:35 2:5 2:6 2:7 2:8 2:9 3:41", "1:5 1:6 1:7 1:8 1:9"))
    close(moved[0, 3:8], packed[0, 3:8])
    assert (moved[0, :3] - packed[0, :3]).abs().max() > 1e-2  # the perturbation itself is felt
    branched = run(decoder, text("1:5 1:6 1:7 1.1:20 1.1:21 1.2:8 1.2:9 2:5 2:6 2:7 2:8", "1:5 1:6 1:7 1:8 1:9"))
    close(branched[0, [0, 1, 2, 5, 6]], alone)
    close(branched[0, 7:11], alone[:4])
    close(branched[1, :5], alone)
    left = run(decoder, text("0:0 0:0 0:0 1:5 1:6 1:7 1:8 1:9"))
    close(left[0, 3:], alone)


@pytest.mark.parametrize("mixer", MIXERS)
def test_order_matters_unless_nothing_fades(mixer: str) -> None:
    decoder = decoder_with(mixer, layers=1)
    a = run(decoder, text("1:5 1:6 1:7"))[0, -1]
    b = run(decoder, text("1:6 1:5 1:7"))[0, -1]
    assert ((a - b).abs().max() > 1e-4) == mixer.startswith("mamba2")


@pytest.mark.parametrize("pieces", [[4, 2, 1, 1, 1], [1] * 9])
@pytest.mark.parametrize("mixer", MIXERS)
def test_cached_steps_equal_the_full_pass(mixer: str, pieces: list[int]) -> None:
    decoder = decoder_with(mixer)
    ids = torch.randint(1, 90, (1, 9))[0]
    full = run(decoder, text(" ".join(f"1:{i}" for i in ids.tolist())))
    cache = decoder.new_cache()
    parts = [run(decoder, text(" ".join(f"1:{i}" for i in piece.tolist())), cache) for piece in ids.split(pieces)]
    close(torch.cat(parts, 1), full)
    part = decoder.layers[0].get_submodule("mixer")
    assert isinstance(part, (Mamba2, LinearAttention))
    assert cache.bytes() == 2 * 4 * part.cache_numbers_fixed()  # 2 layers, float32, however long the row


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_go_on_as_alone(mixer: str, side: str) -> None:
    """Prompts padded on either side, dropped rows, and pieces that are padded themselves (the other kind of gap)."""
    decoder = decoder_with(mixer)
    prompts, more = ["1:5 1:6", "1:7 1:8 1:9 1:10 1:11", "1:12 1:13 1:14"], ["1:40 1:41 0:0", "0:0 1:42 1:43"]
    rows = [
        f"{'0:0 ' * (5 - len(p.split()))}{p}" if side == "left" else f"{p}{' 0:0' * (5 - len(p.split()))}"
        for p in prompts
    ]
    cache = decoder.new_cache()
    run(decoder, text(*rows), cache)
    cache.keep(torch.tensor([2, 0]))
    both = run(decoder, text(*more), cache)
    last = run(decoder, text("1:50", "1:51"), cache)
    first = run(decoder, text(f"{prompts[2]} 1:40 1:41 1:50"))[0, -3:]
    second = run(decoder, text(f"{prompts[0]} 1:42 1:43 1:51"))[0, -3:]
    close(torch.stack([both[0, 0], both[0, 1], last[0, 0]]), first)
    close(torch.stack([both[1, 1], both[1, 2], last[1, 0]]), second)


@pytest.mark.parametrize("mixer", MIXERS)
def test_another_document_after_a_cache_starts_afresh(mixer: str) -> None:
    decoder = decoder_with(mixer)
    cache = decoder.new_cache()
    run(decoder, text("1:5 1:6 2:7 2:8"), cache)
    on = run(decoder, text("2:9 3:5 3:6"), cache)[0]
    close(on[0], run(decoder, text("1:7 1:8 1:9"))[0, -1])
    close(on[1:], run(decoder, text("1:5 1:6"))[0])


def test_a_cache_with_branches_is_refused() -> None:
    decoder = decoder_with("mamba2")
    with pytest.raises(ValueError, match="cannot keep a cache of rows with branches"):
        run(decoder, text("1:5 1.1:6 1.2:7"), decoder.new_cache())


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("rows", [["1:5 1:6 1:7 1:8 1:9"], ["1:5 1:6 1.1:7 1.1:8 1.2:9", "1:8 2:5 2:6 2.1:7 2.2:9"]])
def test_gradients_reach_every_parameter(mixer: str, rows: list[str]) -> None:
    torch.manual_seed(0)
    part = MIXERS[mixer](32)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    sequence = splice(text(*rows), nn.Embedding(90, 32), {}, nn.Embedding(3, 32))
    y = part(sequence.embeddings, Layout.of(sequence))
    (y * torch.randn_like(y)).sum().backward()
    finite_nonzero_gradients(part)


def test_no_gradient_crosses_documents_or_branches() -> None:
    torch.manual_seed(0)
    part = MIXERS["mamba2"](32)
    batch = text("1:5 1:6 1.1:7 1.1:8 1.2:9 1.2:10 2:11 2:12")
    sequence = splice(batch, nn.Embedding(90, 32), {}, nn.Embedding(3, 32))
    x = sequence.embeddings.detach().requires_grad_()
    y = part(x, Layout.of(sequence))
    grad = torch.autograd.grad(y[0, 5].square().sum(), x)[0][0].abs().amax(-1)
    assert (grad > 0).tolist() == [True, True, False, False, True, True, False, False]


def test_hybrid_with_attention_generates_as_in_one_pass() -> None:
    torch.manual_seed(0)
    kinds = {"m": MIXERS["mamba2"], "a": partial(GroupedAttention, heads=4, kv_heads=2)}
    groups = [LayerGroup(["m/none", "m/f", "a/f"])]
    decoder = Decoder(32, kinds, {"f": partial(GatedFFN, hidden=40)}, groups, vocab_size=97).eval()
    full = run(decoder, text("1:5 1:6 1:7 1:8 1:9"))
    cache = decoder.new_cache()
    sequences = [splice(text(row), decoder.embed, {}, nn.Embedding(3, 32)) for row in ("1:5 1:6 1:7", "1:8", "1:9")]
    parts = []
    for sequence in sequences:
        sequence.index += len(cache)
        parts.append(decoder(sequence, cache)[0])
    close(torch.cat(parts, 1), full)


def test_half_precision_keeps_its_recurrence_in_float32() -> None:
    """bfloat16 weights: the state is float32, and the result is within bfloat16's 8 bits of the float32 one."""
    torch.manual_seed(0)
    for name in ("mamba2", "linear"):
        part = MIXERS[name](32)
        x = torch.randn(1, 7, 32)
        layout = one_document(7)
        exact = part(x, layout)
        with torch.autocast("cpu", torch.bfloat16):
            close_to = part(x, one_document(7))
        assert close_to.dtype == torch.bfloat16
        torch.testing.assert_close(close_to.float(), exact, atol=3e-2, rtol=3e-2)


def test_gated_norm_is_per_group() -> None:
    norm = GatedGroupNorm(6, 2, eps=1e-5)
    y, gate = torch.randn(4, 6), torch.randn(4, 6)
    gated = (y * F.silu(gate)).view(4, 2, 3)
    expected = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(norm(y, gate), expected.flatten(1))


def test_time_steps_are_bounded() -> None:
    torch.manual_seed(0)
    part = Mamba2(16, heads=2, head_dim=8, state=4, dt_limit=(0.01, 0.02))
    x, layout = torch.randn(1, 5, 16), one_document(5)
    nn.init.constant_(part.dt_bias, 50.0)  # far above the limit: its exact value must not matter
    high = part(x, layout)
    nn.init.constant_(part.dt_bias, 60.0)
    assert torch.equal(part(x, layout), high)


def test_costs() -> None:
    part = Mamba2(16, heads=4, head_dim=8, state=3, groups=2, conv=4)
    assert part.cache_numbers_per_token() == 0 and part.attention_flops(1) == part.attention_flops(10**6)
    assert part.cache_numbers_fixed() == 4 * 8 * 3 + 3 * (32 + 2 * 2 * 3)
    assert LinearAttention(16, heads=2).cache_numbers_fixed() == 2 * 8 * 9


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Mamba2(30, head_dim=16), "twice width 30 .* head_dim 16"),
        (lambda: Mamba2(32, heads=4, groups=3), "heads 4 .* groups 3"),
        (lambda: Mamba2(32, heads=4, conv=0), "conv 0"),
        (lambda: LinearAttention(32, heads=5), "width 32 .* heads 5"),
        (lambda: LinearAttention(32, heads=4, chunk=0), "chunk 0"),
    ],
)
def test_what_a_config_can_get_wrong(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
