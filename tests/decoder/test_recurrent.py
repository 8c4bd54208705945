"""Recurrent mixers: the chunked scan against a sum over visible pairs, and everything that must not leak or be lost."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.attention.linear import LinearAttention
from mm.decoder.attention.paths import Paths
from mm.decoder.attention.scan import scan
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


def layout_of(documents: list[list[int]], branches: list[list[int]] | None = None, past: Any = None) -> Layout:
    ids = torch.tensor(documents)
    branch = torch.zeros_like(ids) if branches is None else torch.tensor(branches)
    here = Places(torch.zeros_like(ids), ids, branch)
    before = None if past is None else Places(*(torch.tensor(past) * scale for scale in (0, 1, 0)))
    return Layout(here, before.append(here) if before else here, torch.zeros(*ids.shape, 3))


def by_pairs(x: Tensor, b: Tensor, c: Tensor, decay: Tensor, layout: Layout) -> Tensor:
    """y_t = sum over visible s of exp(sum of the decays after s on t's path) (c_t . b_s) x_s, one pair at a time."""
    visible = layout.mask()[:, 0] & (layout.keys.document_ids > 0)[:, None]
    y = torch.zeros_like(x)
    per_group = x.shape[2] // b.shape[2]
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            path = visible[row, t].nonzero()[:, 0].tolist()
            for place, s in enumerate(path):
                left = decay[row, path[place + 1 :]].sum(0).exp()  # (H,)
                weight = (c[row, t] * b[row, s]).sum(-1).repeat_interleave(per_group)
                y[row, t] += (left * weight)[:, None] * x[row, s]
    return y


LAYOUTS: dict[str, tuple[Any, Any]] = {
    "one document": ([[1] * 11], None),
    "padded on either side": ([[0, 0] + [1] * 9, [1] * 7 + [0] * 4], None),
    "packed": ([[1] * 3 + [2] + [3] * 7, [1] * 5 + [2] * 4 + [0] * 2], None),
    "branches": (
        [[1] * 9 + [2, 2], [1] * 2 + [2] * 6 + [0] * 3],
        [[0] * 4 + [1, 1, 2, 3, 3] + [0, 0], [0, 0, 0, 1, 2, 2, 2, 3, 0, 0, 0]],
    ),
    "branches without a common part": ([[1] * 5 + [2] * 6], [[1, 1, 2, 2, 2, 0, 0, 1, 1, 2, 2]]),
    "nothing common at all": ([[1] * 11], [[1] * 4 + [2] * 7]),
}


@pytest.mark.parametrize("decaying", [True, False])
@pytest.mark.parametrize("case", LAYOUTS)
def test_scan_equals_the_sum_over_visible_pairs(case: str, decaying: bool) -> None:
    torch.manual_seed(0)
    layout = layout_of(*LAYOUTS[case])
    rows, length = layout.queries.document_ids.shape
    x, b, c = torch.randn(rows, length, 4, 3), torch.randn(rows, length, 2, 5), torch.randn(rows, length, 2, 5)
    decay = -3 * torch.rand(rows, length, 4)
    paths = Paths.of(layout)
    x, decay = x * paths.real[..., None, None], decay * paths.real[..., None]
    expected = by_pairs(x, b, c, decay if decaying else torch.zeros_like(decay), layout)
    for chunk in (1, 3, 4, 64):
        y, _ = scan(x, b, c, decay if decaying else None, paths, chunk)
        close(y[paths.real], expected[paths.real])


@pytest.mark.parametrize("pieces", [[11], [4, 7], [1] * 11, [2, 1, 8]])
def test_scan_goes_on_from_a_state(pieces: list[int]) -> None:
    torch.manual_seed(0)
    x, b, c, decay = torch.randn(2, 11, 2, 3), torch.randn(2, 11, 1, 5), torch.randn(2, 11, 1, 5), -torch.rand(2, 11, 2)
    whole, end = scan(x, b, c, decay, Paths.of(layout_of([[1] * 11] * 2)), 4)
    state, parts, done = None, [], 0
    for size in pieces:
        layout = layout_of([[1] * size] * 2, past=[[1] * done] * 2 if done else None)
        here = slice(done, done + size)
        y, state = scan(x[:, here], b[:, here], c[:, here], decay[:, here], Paths.of(layout), 4, state)
        parts.append(y)
        done += size
    assert state is not None
    close(torch.cat(parts, 1), whole)
    close(state, end)


def test_strong_decay_keeps_its_digits() -> None:
    """After decays that sum to thousands, differences of one float32 running sum would be off by 1e-3 and more."""
    torch.manual_seed(0)
    rows, length = 1, 32
    x, b, c = torch.randn(rows, length, 1, 2), torch.randn(rows, length, 1, 4), torch.randn(rows, length, 1, 4)
    decay = torch.where(torch.arange(length) % 16 < 12, torch.tensor(-150.0), torch.tensor(-0.01))[None, :, None]
    layout = layout_of([[1] * length])
    y, _ = scan(x, b, c, decay, Paths.of(layout), 32)
    exact = by_pairs(x.double(), b.double(), c.double(), decay.double(), layout)
    torch.testing.assert_close(y.double(), exact, atol=2e-6, rtol=1e-6)


def test_scan_gradients_equal_those_of_the_sum() -> None:
    torch.manual_seed(0)
    layout = layout_of(*LAYOUTS["branches"])
    paths = Paths.of(layout)
    shapes = [(2, 11, 2, 3), (2, 11, 1, 4), (2, 11, 1, 4), (2, 11, 2)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    upstream = torch.randn(2, 11, 2, 3) * paths.real[..., None, None]
    grads = []
    for chunked in (True, False):
        x, b, c, decay = inputs
        x, decay = x * paths.real[..., None, None], -F.softplus(decay) * paths.real[..., None]
        y = scan(x, b, c, decay, paths, 4)[0] if chunked else by_pairs(x, b, c, decay, layout)
        grads.append(torch.autograd.grad((y * upstream).sum(), inputs))
    for ours, pairs in zip(*grads, strict=True):
        close(ours, pairs)


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
        layout = layout_of([[1] * 7])
        exact = part(x, layout)
        with torch.autocast("cpu", torch.bfloat16):
            close_to = part(x, layout_of([[1] * 7]))
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
    x, layout = torch.randn(1, 5, 16), layout_of([[1] * 5])
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
