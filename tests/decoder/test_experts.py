"""Experts against a plain loop, dropped choices, capacity, shared experts, and what a config can get wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.ffn import dense
from mm.decoder.ffn.experts import ClampedSwigluExperts, Experts, GegluExperts, PlainExperts, SwigluExperts
from mm.decoder.ffn.moe import SparseMoE, limit_capacity
from mm.decoder.ffn.routers.expert_choice import ExpertChoiceRouter
from mm.decoder.ffn.routers.sigmoid_bias import SigmoidBiasRouter
from mm.decoder.ffn.routers.topk import TopKRouter
from mm.types import Routing

D, HIDDEN, E, K = 8, 12, 5, 2
KINDS = {
    "swiglu": lambda: SwigluExperts(D, HIDDEN, E),
    "swiglu_bias": lambda: SwigluExperts(D, HIDDEN, E, bias=True),
    "geglu": lambda: GegluExperts(D, HIDDEN, E, "gelu"),
    "geglu_tanh": lambda: GegluExperts(D, HIDDEN, E, bias=True),
    "clamped": lambda: ClampedSwigluExperts(D, HIDDEN, E, alpha=1.3, limit=0.8),
    "clamped_plain": lambda: ClampedSwigluExperts(D, HIDDEN, E, limit=1.1, bias=False),
    "gelu": lambda: PlainExperts(D, HIDDEN, E, "gelu", bias=False),
    "gelu_tanh": lambda: PlainExperts(D, HIDDEN, E),
    "relu": lambda: PlainExperts(D, HIDDEN, E, "relu"),
    "relu2": lambda: PlainExperts(D, HIDDEN, E, "relu2"),
}
ACTIVATION = {"swiglu": F.silu, "swiglu_bias": F.silu, "geglu": F.gelu, "gelu": F.gelu}


def close(actual: Tensor, expected: Tensor) -> None:
    """float32 sums of tens of terms in another order: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def one_expert(kind: str, experts: Experts, x: Tensor, e: int) -> Tensor:
    """The definition, for one token."""
    first, bias = experts.get_parameter(experts.first_name)[e], getattr(experts, f"{experts.first_name}_bias")
    inner = first @ x + (0 if bias is None else bias[e])
    if kind.startswith("clamped"):
        activation = experts.activation
        inner = dense.clamped_swiglu(*inner.chunk(2), activation.alpha, activation.limit)  # pyright: ignore
    elif "glu" in kind:
        gate, up = inner.chunk(2)
        inner = ACTIVATION.get(kind, dense.activation("gelu_tanh"))(gate) * up
    else:
        inner = dense.activation(kind)(inner)
    return experts.down[e] @ inner + (0 if experts.down_bias is None else experts.down_bias[e])


def by_loop(kind: str, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    out = []
    taken = routing.taken()
    for s in range(len(x)):
        y = 0 * x[s]
        for k, e in enumerate(routing.indices[s].tolist()):
            if taken[s, k]:
                y = y + routing.weights[s, k] * one_expert(kind, experts, x[s], e)
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_a_plain_loop(kind: str, holes: bool) -> None:
    """With `holes`, padding and choices that are not carried out; expert 4 has no token."""
    torch.manual_seed(0)
    experts, tokens = KINDS[kind](), 17
    for p in experts.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(tokens, D, requires_grad=True)
    weights = torch.rand(tokens, K, requires_grad=True)
    indices = torch.stack([torch.randperm(E - 1)[:K] for _ in range(tokens)])
    mask = torch.arange(tokens) % 5 != 3 if holes else torch.ones(tokens, dtype=torch.bool)
    kept = torch.rand(tokens, K) < 0.7 if holes else None
    routing = Routing(indices, weights, torch.zeros(tokens, E), torch.zeros(tokens, E), mask, kept)
    upstream = torch.randn(tokens, D)
    results = []
    for compute in (experts, lambda x, r: by_loop(kind, experts, x, r)):
        experts.zero_grad()
        x.grad = weights.grad = None
        y = compute(x, routing)
        (y * upstream).sum().backward()
        results.append([y.detach(), *(p.grad for p in experts.parameters()), x.grad, weights.grad])
    for ours, loop in zip(*results, strict=True):
        close(ours, loop)
    if holes:
        assert not results[0][0][~mask].any()  # padding costs nothing and says nothing


def test_a_clamped_number_has_no_gradient() -> None:
    experts = ClampedSwigluExperts(1, 1, 1, limit=2.0, bias=False)
    nn.init.ones_(experts.gate_up)
    nn.init.ones_(experts.down)
    routing = routing_of([[0], [0], [0]], 1)
    routing.weights = torch.ones(3, 1)
    x = torch.tensor([[1.0], [3.0], [-3.0]], requires_grad=True)
    experts(x, routing).sum().backward()
    assert x.grad is not None
    silu = torch.tensor(-3.0, requires_grad=True)  # below -limit only the gate still moves: (up + 1) is -1
    (-silu * torch.sigmoid(1.702 * silu)).backward()
    assert x.grad[1] == 0 and x.grad[2] == pytest.approx(float(silu.grad or 0)) and x.grad[0] > 0


def test_frozen_experts_pass_gradients_on_and_take_none() -> None:
    experts = SwigluExperts(D, HIDDEN, E).requires_grad_(False)
    for p in experts.parameters():
        nn.init.normal_(p)
    x = torch.randn(6, D, requires_grad=True)
    router = TopKRouter(D, E, K)
    nn.init.normal_(router.weight)
    experts(x, router(x, torch.ones(6, dtype=torch.bool))).sum().backward()
    assert x.grad is not None and x.grad.any() and experts.gate_up.grad is None and router.weight.grad is not None


def routing_of(indices: list[list[int]], experts: int, mask: list[int] | None = None) -> Routing:
    chosen = torch.tensor(indices)
    scores = torch.full((len(chosen), experts), 1 / experts)
    real = torch.ones(len(chosen), dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    return Routing(chosen, torch.full(chosen.shape, 0.5), scores, scores, real)


def test_capacity_keeps_the_first_and_counts_the_rest() -> None:
    """Six tokens, four experts, two each: room is 1.0 * 12 / 4 = 3. Expert 0 was chosen five times."""
    routing = routing_of([[0, 1], [0, 2], [1, 0], [0, 3], [0, 2], [3, 1]], 4)
    limited = limit_capacity(routing, 1.0)
    assert limited.kept is not None and limited.dropped is not None
    dropped = [(3, 0), (4, 0)]
    assert [(s, k) for s in range(6) for k in range(2) if not limited.kept[s, k]] == dropped
    assert limited.dropped.tolist() == [2, 0, 0, 0]
    assert limited.load().tolist() == [3, 3, 2, 2] and limited.demand().tolist() == [5, 3, 2, 2]
    assert torch.equal(limited.indices, routing.indices) and routing.kept is None
    free = limit_capacity(routing, 2.0)
    assert free.dropped is not None and not free.dropped.any() and torch.equal(free.load(), routing.load())


def test_padding_takes_no_room() -> None:
    """Four real tokens, all to expert 0: room is ceil(1.0 * 4 / 2) = 2, whatever the padding before them chose."""
    routing = limit_capacity(routing_of([[0]] * 7, 2, mask=[0, 0, 1, 1, 0, 1, 1]), 1.0)
    assert routing.taken()[:, 0].tolist() == [False, False, True, True, False, False, False]
    assert routing.dropped is not None and routing.dropped.tolist() == [2, 0]


def test_a_dropped_token_keeps_what_is_not_routed() -> None:
    torch.manual_seed(0)
    moe = SparseMoE(D, HIDDEN, E, 1, shared=1, capacity=0.2).train()
    for p in moe.parameters():
        nn.init.normal_(p, std=0.3)
    x, mask = torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool)
    y, routing = moe(x, mask)
    taken = routing.taken().view(2, 20)
    assert moe.shared is not None and routing.dropped is not None and 0 < taken.sum() < 40
    assert routing.dropped.sum() == 40 - taken.sum()
    torch.testing.assert_close(y[~taken], moe.shared(x)[~taken])
    y.sum().backward()
    _, whole = moe.eval()(x, mask)
    assert whole.dropped is None and whole.load().sum() == 40  # evaluation and generation drop nothing


def test_capacity_is_causal() -> None:
    """What stands later in a row never takes an earlier token's room."""
    torch.manual_seed(0)
    moe = SparseMoE(D, HIDDEN, E, K, capacity=0.5).train()
    for p in moe.parameters():
        nn.init.normal_(p, std=0.5)
    x, mask = torch.randn(1, 12, D), torch.ones(1, 12, dtype=torch.bool)
    moved = x.clone()
    moved[:, 8:] = torch.randn(1, 4, D)
    close(moe(moved, mask)[0][:, :8], moe(x, mask)[0][:, :8])


def test_shared_experts_have_a_width_and_a_gate() -> None:
    torch.manual_seed(0)
    moe = SparseMoE(D, HIDDEN, E, K, shared_hidden=20, shared_gate=True)
    for p in moe.parameters():
        nn.init.normal_(p, std=0.5)
    assert moe.shared is not None and moe.shared.down.weight.shape == (D, 20)
    x, mask = torch.randn(1, 6, D), torch.ones(1, 6, dtype=torch.bool)
    y, routing = moe(x, mask)
    gate = (x @ moe.get_parameter("shared_gate.weight").T).sigmoid()
    torch.testing.assert_close(y, moe.experts(x[0], routing)[None] + gate * moe.shared(x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SparseMoE(D, HIDDEN, gate="all", router=TopKRouter), "gate 'all'"),
        (lambda: SparseMoE(D, HIDDEN, shared=1, shared_hidden=4), "shared .1. or shared_hidden .4."),
        (lambda: SparseMoE(D, HIDDEN, shared_gate=True), "shared_gate without"),
        (lambda: SparseMoE(D, HIDDEN, capacity=0.0), "capacity must be positive"),
        (
            lambda: SparseMoE(D, HIDDEN, router=lambda *n: ExpertChoiceRouter(*n, look_ahead=True), capacity=1.0),
            "capacity 1.0 with ExpertChoiceRouter",
        ),
        (lambda: TopKRouter(D, 8, 2, groups=3), "num_experts 8 .* groups 3"),
        (lambda: SigmoidBiasRouter(D, 8, 2, groups=4, groups_chosen=5), "groups_chosen 5"),
        (lambda: SigmoidBiasRouter(D, 8, 5, groups=4, groups_chosen=2), "more than the 4 experts"),
    ],
)
def test_what_a_config_can_get_wrong(make, match) -> None:
    with pytest.raises(ValueError, match=match):
        make()
