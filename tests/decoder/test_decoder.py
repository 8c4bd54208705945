"""The decoder: who sees whom, caching, experts against a plain loop, balance, and the errors a config can cause."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mm.decoder.attention.backends import sdpa
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.balance import Balance, switch_loss, z_loss
from mm.decoder.ffn.dense import GatedFFN, PlainFFN
from mm.decoder.ffn.experts import SwigluExperts
from mm.decoder.ffn.moe import SparseMoE, max_over_mean_load, moe_layers
from mm.decoder.ffn.routers.topk import TopKRouter
from mm.decoder.layout import Layout
from mm.decoder.positions import Alibi, RopeScaling, Rotary
from mm.fusion.splice import splice
from mm.testing import element_batch, finite_nonzero_gradients, tiny_decoder
from mm.types import Batch, Routing


def close(actual: torch.Tensor, expected: torch.Tensor, what: str | None = None) -> None:
    """A float32 product sums hundreds of terms in an order that depends on shapes: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=what)


def run(decoder: Decoder, batch: Batch):
    slots = nn.Embedding(3, decoder.width)
    sequence = splice(batch, decoder.embed, {}, slots)
    return decoder(sequence)


def text(*rows: str) -> Batch:
    """Rows like "1:5 1:6 2:7" or "1.2:8" (document, branch, id)."""

    def element(word: str):
        place, token = word.split(":")
        document, _, branch = place.partition(".")
        return int(document), int(branch or 0), token

    return element_batch([[element(word) for word in row.split()] for row in rows])


POSITIONS = {
    "rotary": Rotary(),
    "sectioned": Rotary(sections=(2, 1, 1)),
    "interleaved": Rotary(sections=(2, 1, 1), interleaved=True),
    "partial": Rotary(fraction=0.5),
    "alibi": Alibi(),
    "none": None,
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("window", [None, 3])
def test_packing_and_branches_never_leak(positions, window):
    """Whatever stands in another document or another branch, outputs do not move; packed equals alone."""
    torch.manual_seed(0)
    mixer = partial(GroupedAttention, heads=4, kv_heads=2, positions=POSITIONS[positions], window=window, qk_norm=True)
    decoder = tiny_decoder(mixer=mixer, layers=2).eval()
    alone = run(decoder, text("1:5 1:6 1:7 1:8 1:9"))[0][0]
    packed = run(decoder, text("1:30 1:31 1:32 2:5 2:6 2:7 2:8 2:9 3:40", "1:5 1:6 1:7 1:8 1:9"))[0]
    close(packed[0, 3:8], alone)
    close(packed[1, :5], alone)
    moved = run(decoder, text("1:33 1:34 1:35 2:5 2:6 2:7 2:8 2:9 3:41", "1:5 1:6 1:7 1:8 1:9"))[0]
    close(moved[0, 3:8], packed[0, 3:8])
    assert (moved[0, :3] - packed[0, :3]).abs().max() > 1e-2  # the perturbation itself is felt
    branched = run(decoder, text("1:5 1:6 1:7 1.1:20 1.1:21 1.2:8 1.2:9"))[0]
    close(branched[0, [0, 1, 2, 5, 6]], alone)


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_matters(positions):
    """One layer: a second one can tell places apart by what the first one saw, even without positions."""
    decoder = tiny_decoder(layers=1, mixer=partial(GroupedAttention, heads=4, positions=POSITIONS[positions])).eval()
    a = run(decoder, text("1:5 1:6 1:7"))[0][0, -1]
    b = run(decoder, text("1:6 1:5 1:7"))[0][0, -1]
    assert ((a - b).abs().max() > 1e-3) == (positions != "none")


def test_documents_one_by_one_equal_one_mask(monkeypatch):
    torch.manual_seed(0)
    rows = [
        " ".join(f"{1 + i // 150}:{5 + i % 90}" for i in range(600)),
        " ".join(f"1:{5 + i % 70}" for i in range(560)),
    ]
    decoder = tiny_decoder().eval()
    one_by_one = run(decoder, text(*rows))[0]
    monkeypatch.setattr(sdpa, "BLOCK", 10**9)
    close(one_by_one[:, :560], run(decoder, text(*rows))[0][:, :560])


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 4, None), (6, 2, 10), (4, 1, None)])
@pytest.mark.parametrize("positions", ["rotary", "sectioned", "alibi"])
def test_cached_steps_equal_the_full_pass(heads, kv_heads, head_dim, positions):
    torch.manual_seed(0)
    scheme = (
        Rotary(sections=(head_dim // 2 - 2, 1, 1)) if positions == "sectioned" and head_dim else POSITIONS[positions]
    )
    width = 32 if head_dim is None else 30
    mixer = partial(GroupedAttention, heads=heads, kv_heads=kv_heads, head_dim=head_dim, positions=scheme, window=4)
    decoder = tiny_decoder(width, mixer=mixer).eval()
    ids = torch.randint(1, 90, (1, 9))
    full = run(decoder, text(" ".join(f"1:{i}" for i in ids[0].tolist())))[0]
    cache = decoder.new_cache()
    slots = nn.Embedding(3, width)
    parts = []
    for piece in ids[0].split([4, 2, 1, 1, 1]):
        batch = text(" ".join(f"1:{i}" for i in piece.tolist()))
        sequence = splice(batch, decoder.embed, {}, slots)
        sequence.index += len(cache)
        sequence.positions += len(cache)
        parts.append(decoder(sequence, cache)[0])
    close(torch.cat(parts, 1), full)
    attention = decoder.layers[0].get_submodule("mixer")
    assert isinstance(attention, GroupedAttention)
    assert cache.bytes() == 2 * 4 * attention.cache_numbers_per_token() * 9  # 2 layers, 4 bytes a number, 9 tokens


def experts_by_loop(experts: SwigluExperts, x, routing: Routing):
    out = 0 * x
    for s in range(len(x)):
        for weight, e in zip(routing.weights[s], routing.indices[s], strict=True):
            gate, up = (experts.gate_up[e] @ x[s]).chunk(2)
            out[s] = out[s] + weight * (experts.down[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("case", ["spread", "one expert", "one token", "no token"])
def test_experts_equal_a_plain_loop(case):
    torch.manual_seed(0)
    tokens = {"one token": 1, "no token": 0}.get(case, 17)
    experts = SwigluExperts(8, 12, 5)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(tokens, 8, requires_grad=True)
    weights = torch.rand(tokens, 2, requires_grad=True)
    indices = (
        torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]) if tokens else torch.zeros(0, 2, dtype=torch.long)
    )
    if case == "one expert":
        indices = torch.full((tokens, 2), 3)
    routing = Routing(
        indices, weights, torch.zeros(tokens, 5), torch.zeros(tokens, 5), torch.ones(tokens, dtype=torch.bool)
    )
    upstream = torch.randn(1, 8).expand(tokens, 8)  # stride 0, as .sum() gives
    results = []
    for compute in (experts, lambda x, r: experts_by_loop(experts, x, r)):
        experts.zero_grad()
        x.grad = weights.grad = None
        y = compute(x, routing)
        (y * upstream).sum().backward()
        grads = [experts.gate_up.grad, experts.down.grad, x.grad, weights.grad]
        results.append([y, *(torch.zeros(()) if g is None else g for g in grads)])
    for ours, loop in zip(*results, strict=True):
        close(ours, loop.expand_as(ours))


def test_router_bias_moves_the_choice_and_not_the_weight():
    torch.manual_seed(0)
    router = TopKRouter(8, 5, 2)
    nn.init.normal_(router.weight)
    x, mask = torch.randn(50, 8), torch.ones(50, dtype=torch.bool)
    before = router(x, mask)
    router.bias[3] = 10.0
    after = router(x, mask)
    assert (after.indices == 3).any(-1).all() and not (before.indices == 3).any(-1).all()
    chosen = after.scores.gather(-1, after.indices)
    torch.testing.assert_close(after.weights, chosen / chosen.sum(-1, keepdim=True))
    torch.testing.assert_close(after.scores, before.scores)


def test_router_maths_is_float32_for_bfloat16_activations():
    router = TopKRouter(8, 5, 2)
    nn.init.normal_(router.weight)
    routing = router(torch.randn(3, 8).bfloat16(), torch.ones(3, dtype=torch.bool))
    assert routing.logits.dtype == routing.scores.dtype == torch.float32 and routing.weights.dtype == torch.bfloat16


def test_gate_over_all_is_the_plain_softmax():
    router = TopKRouter(8, 5, 2, gate="all")
    nn.init.normal_(router.weight)
    routing = router(torch.randn(7, 8), torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(routing.weights, routing.logits.softmax(-1).topk(2).values)


def test_padding_is_in_no_statistic():
    torch.manual_seed(0)
    logits = torch.randn(10, 4)
    scores, mask = logits.softmax(-1), torch.arange(10) < 6
    indices = scores.topk(2).indices
    padded = Routing(indices, scores, logits, scores, mask)
    bare = Routing(indices[:6], scores[:6], logits[:6], scores[:6], mask[:6])
    assert padded.load().sum() == 12
    for rule in (switch_loss, z_loss):
        torch.testing.assert_close(rule(padded), rule(bare))
    none = Routing(indices, scores, logits, scores, torch.zeros(10, dtype=torch.bool))
    assert switch_loss(none) == 0 and z_loss(none) == 0


def test_switch_loss_is_one_when_even_and_e_when_collapsed():
    even = Routing(
        torch.arange(4)[:, None],
        torch.ones(4, 1),
        torch.zeros(4, 4),
        torch.full((4, 4), 0.25),
        torch.ones(4, dtype=torch.bool),
    )
    one = F.one_hot(torch.zeros(4, dtype=torch.long), 4).float()
    collapsed = Routing(
        torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), one, one, torch.ones(4, dtype=torch.bool)
    )
    assert switch_loss(even) == pytest.approx(1) and switch_loss(collapsed) == pytest.approx(4)
    assert max_over_mean_load(even.load()) == 1 and max_over_mean_load(collapsed.load()) == 4
    assert max_over_mean_load(torch.zeros(4)) == 0


def test_bias_update_evens_a_skewed_router():
    torch.manual_seed(0)
    layer = SparseMoE(16, 8, num_experts=8, experts_per_token=2)
    nn.init.normal_(layer.router.weight, std=0.05)
    x = torch.randn(4, 128, 16) + 2 * layer.router.weight[0] / layer.router.weight[0].norm()
    mask = torch.ones(4, 128, dtype=torch.bool)
    balance = Balance(bias_rate=1e-3)
    before = max_over_mean_load(layer.router(x.flatten(0, 1), mask.flatten()).load())
    for _ in range(300):
        balance.update_biases([layer], layer.router(x.flatten(0, 1), mask.flatten()).load()[None])
    after = max_over_mean_load(layer.router(x.flatten(0, 1), mask.flatten()).load())
    assert before > 1.5 and after < 1.2, (before, after)


def test_balance_switches():
    torch.manual_seed(0)
    logits = torch.randn(10, 4)
    routing = Routing(logits.topk(2).indices, logits, logits, logits.softmax(-1), torch.ones(10, dtype=torch.bool))
    assert set(Balance().losses([routing])) == {"balance/switch", "balance/z"}
    assert Balance(switch=0, z=0).losses([routing]) == {} and Balance().losses([]) == {}


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    decoder = tiny_decoder(mixer=partial(GroupedAttention, heads=4, bias=True), ffn=None)
    hidden, routings = run(decoder, text(" ".join(f"1:{i}" for i in range(1, 90))))
    (decoder.head(hidden).square().mean() + z_loss(routings[1])).backward()
    finite_nonzero_gradients(decoder)


def test_shared_experts_and_plain_ffn():
    moe = SparseMoE(16, 8, shared=2)
    assert moe.shared is not None and moe.shared.down.weight.shape == (16, 16)
    y, routing = moe(torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    assert y.shape == (2, 3, 16) and routing.indices.shape == (6, 2)
    for activation in ("gelu_tanh", "gelu", "relu"):
        assert PlainFFN(16, 8, activation)(torch.randn(2, 16)).shape == (2, 16)
    assert len(moe_layers(tiny_decoder(layers=3))) == 2


def test_rope_scalings():
    plain = Rotary().scaling
    assert plain is None
    base, _ = RopeScaling("linear", 1.0).apply(16, 1e4)
    half, _ = RopeScaling("linear", 2.0).apply(16, 1e4)
    torch.testing.assert_close(half * 2, base)
    ntk, _ = RopeScaling("ntk", 4.0).apply(16, 1e4)
    assert ntk[0] == base[0] and ntk[-1] == pytest.approx(
        float(base[-1] / 4)
    )  # highest kept, lowest divided by the factor
    yarn, scale = RopeScaling("yarn", 8.0, original_length=64).apply(64, 1e4)
    full, _ = RopeScaling("linear", 1.0).apply(64, 1e4)
    assert (
        yarn[0] == full[0]
        and yarn[-1] == pytest.approx(float(full[-1] / 8))
        and scale == pytest.approx(0.1 * 2.0794415 + 1)
    )
    llama, _ = RopeScaling("llama3", 8.0).apply(128, 5e5)
    long, _ = RopeScaling("linear", 1.0).apply(128, 5e5)
    assert llama[0] == long[0] and llama[-1] == pytest.approx(float(long[-1] / 8))


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: GroupedAttention(32, heads=5), "width 32 .* heads 5"),
        (lambda: GroupedAttention(32, heads=4, kv_heads=3), "heads 4 .* kv_heads 3"),
        (lambda: TopKRouter(8, 4, 5), "experts_per_token 5"),
        (
            lambda: tiny_decoder(
                layers=1, mixer=lambda w: GroupedAttention(w, heads=4, positions=Rotary(sections=(1, 1, 1)))
            ),
            None,
        ),
        (lambda: Decoder(32, {"a": nn.Identity}, {"b": nn.Identity}, [LayerGroup(["a"])]), "mixer/ffn"),
        (
            lambda: Decoder(32, {"a": nn.Identity}, {"b": nn.Identity}, [LayerGroup(["a/c"])]),
            "'c', which is not in ffns",
        ),
    ],
)
def test_what_a_config_can_get_wrong(make, match):
    if match is None:
        with pytest.raises(ValueError, match="sections"):
            run(make(), text("1:5 1:6"))
    else:
        with pytest.raises(ValueError, match=match):
            make()


def test_flash_refuses_what_it_cannot_express():
    layout = Layout.of(splice(text("1:5 1.1:6"), nn.Embedding(50, 8), {}, nn.Embedding(3, 8)))
    attention = GroupedAttention(8, heads=2, backend="flash")
    with pytest.raises(ValueError, match="branches"):
        attention(torch.randn(1, 2, 8), layout)


@pytest.mark.gpu
def test_flash_equals_sdpa():
    torch.manual_seed(0)
    batch = text("1:5 1:6 1:7 2:8 2:9 3:4", "1:5 1:6 1:7 1:8").to("cuda")
    a = GroupedAttention(64, heads=4, kv_heads=2, window=2).cuda().bfloat16()
    b = GroupedAttention(64, heads=4, kv_heads=2, window=2, backend="flash").cuda().bfloat16()
    b.load_state_dict(a.state_dict())
    layout = Layout.of(splice(batch, nn.Embedding(50, 64).cuda(), {}, nn.Embedding(3, 64).cuda()))
    x = torch.randn(2, 6, 64, device="cuda", dtype=torch.bfloat16)
    real = layout.queries.document_ids > 0
    # bfloat16 keeps 8 bits: two orders of summation differ by some 1 % of the value
    torch.testing.assert_close(a(x, layout)[real], b(x, layout)[real], atol=2e-2, rtol=2e-2)
    assert isinstance(GatedFFN(64, 8), nn.Module)
