"""Both dispatches against a loop over tokens: values and every gradient, where routing is odd and gradients are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mm.decoder.ffn import dispatch, products
from mm.decoder.ffn.dispatch import Dispatch, groups
from mm.decoder.ffn.experts import ClampedSwigluExperts, Experts, PlainExperts, SwigluExperts
from mm.types import Routing
from tests.decoder.test_experts import by_loop

D, HIDDEN, E, K, S = 16, 24, 5, 2, 19
KINDS: dict[str, Callable[[Dispatch], Experts]] = {
    "swiglu": lambda how: SwigluExperts(D, HIDDEN, E, dispatch=how),
    "clamped": lambda how: ClampedSwigluExperts(D, HIDDEN, E, alpha=1.3, limit=0.8, dispatch=how),
    "gelu_tanh": lambda how: PlainExperts(D, HIDDEN, E, dispatch=how),
}
# float32 sums of tens of terms in another order; bfloat16 keeps 8 bits, and rounds between the products.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def close(found: Tensor, wanted: Tensor) -> None:
    """Within the dtype's tolerance of the largest number."""
    atol = TOLERANCE[found.dtype] * max(1.0, float(wanted.detach().abs().max())) if wanted.numel() else 0.0
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=atol)


def even(tokens: int, experts: int = E) -> Tensor:
    return torch.stack([torch.randperm(experts)[:K] for _ in range(tokens)])


ROUTED: dict[str, Callable[[], Tensor]] = {
    "evenly": lambda: even(S),
    "two experts are empty": lambda: even(S, E - 2),
    "one token": lambda: even(1),
    "all to one expert": lambda: torch.full((S, K), 3),
}


def routing_of(indices: Tensor, weights: Tensor, mask: Tensor | None = None, kept: Tensor | None = None) -> Routing:
    scores = torch.zeros(len(indices), E)
    return Routing(
        indices, weights, scores, scores, torch.ones(len(indices), dtype=torch.bool) if mask is None else mask, kept
    )


def gradients(y: Tensor, upstream: Tensor, experts: Experts, *inputs: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, [*inputs, *experts.parameters()], upstream, materialize_grads=True)]


def compare(experts: Experts, kind: str, routing: Routing, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The dispatch's in the experts' dtype, the loop's in float64 on the same numbers."""
    found = gradients(experts(x, routing), upstream, experts, x, routing.weights)
    exact = KINDS[kind]("slices").double()
    exact.load_state_dict(experts.state_dict())
    weights = routing.weights.detach().double().requires_grad_()
    in_double = routing_of(routing.indices, weights, routing.mask, routing.kept)
    there = x.detach().double().requires_grad_()
    wanted = gradients(by_loop(kind, exact, there, in_double), upstream.double(), exact, there, weights)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)
    return found


def make(kind: str, how: Dispatch, dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    experts = KINDS[kind](how)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.4)
    return experts.to(dtype)


@pytest.fixture(params=["slices", "slices filled up", "grouped"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Dispatch:
    """`slices` also with rows filled up, as for oneDNN where that is faster: here for the few rows of a test."""
    if request.param == "slices filled up":
        monkeypatch.setattr(products, "LEAST_ROWS", {torch.float32: 0, torch.bfloat16: 0})
        monkeypatch.setattr(products, "LEAST", 0)
        monkeypatch.setattr(products.many_rows, "is_faster", lambda: True)
        monkeypatch.setattr(products.many_rows, "takes_bfloat16", lambda: True)
    return "grouped" if request.param == "grouped" else "slices"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("routed", ROUTED)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(how: Dispatch, kind: str, routed: str, dtype: torch.dtype) -> None:
    experts, indices = make(kind, how, dtype), ROUTED[routed]()
    x = torch.randn(len(indices), D, dtype=dtype, requires_grad=True)
    weights = torch.rand(len(indices), K, dtype=dtype, requires_grad=True)
    compare(experts, kind, routing_of(indices, weights), x, torch.randn(len(indices), D, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_carried_out_says_nothing_and_learns_nothing(how: Dispatch, kind: str) -> None:
    """Padding, and choices beyond an expert's room; then nothing but padding."""
    experts, indices = make(kind, how, torch.float32), even(S)
    x = torch.randn(S, D, requires_grad=True)
    mask, kept = torch.arange(S) % 5 != 3, torch.rand(S, K) < 0.6
    weights = torch.rand(S, K, requires_grad=True)
    y, grad_x, grad_weights, *_ = compare(experts, kind, routing_of(indices, weights, mask, kept), x, torch.randn(S, D))
    assert not y[~mask].any() and not grad_x[~mask].any() and not grad_weights[~(mask[:, None] & kept)].any()
    nowhere = routing_of(indices, weights, torch.zeros(S, dtype=torch.bool))
    for found in compare(experts, kind, nowhere, x, torch.randn(S, D)):
        assert not found.any()


def test_gradients_that_come_in_strides(how: Dispatch) -> None:
    """A sum's gradient is one number seen everywhere (stride 0); a transposed one, and tokens, lie the other way."""
    experts, routing = make("swiglu", how, torch.float32), routing_of(even(S), torch.rand(S, K, requires_grad=True))
    x = torch.randn(D, S).t().requires_grad_()
    compare(experts, "swiglu", routing, x, torch.ones(()).expand(S, D))
    compare(experts, "swiglu", routing, x, torch.randn(D, S).t())


def test_the_same_experts_twice(how: Dispatch) -> None:
    """Their gradients add up, and what one call keeps the other does not touch."""
    experts = make("swiglu", how, torch.float32)
    first, second = (routing_of(even(S), torch.rand(S, K)) for _ in range(2))
    x, upstream = torch.randn(S, D, requires_grad=True), torch.randn(S, D)
    found = gradients(experts(experts(x, first), second), upstream, experts, x)
    wanted = gradients(by_loop("swiglu", experts, by_loop("swiglu", experts, x, first), second), upstream, experts, x)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


def test_no_tokens(how: Dispatch) -> None:
    experts = make("clamped", how, torch.float32)
    x, weights = torch.zeros(0, D, requires_grad=True), torch.zeros(0, K, requires_grad=True)
    found = gradients(
        experts(x, routing_of(torch.zeros(0, K, dtype=torch.long), weights)), torch.zeros(0, D), experts, x, weights
    )
    assert found[0].shape == (0, D) and not any(part.any() for part in found)


def test_rows_are_filled_up_to_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = [products._room(count) for count in range(1, 4097)]
    assert all(count <= room < count + max(16, count / 16) for count, room in enumerate(rooms, 1))
    assert len(set(rooms)) < 100
    places = torch.tensor([0] * 700 + [2] * 33 + [3] * 900 + [4] * 3)  # 4: sent to none of the four
    first, down = torch.zeros(4, 256, 128), torch.zeros(4, 128, 128)
    monkeypatch.setattr(products.many_rows, "is_faster", lambda: True)
    monkeypatch.setattr(products.many_rows, "takes_bfloat16", lambda: True)
    for dtype in (torch.float32, torch.bfloat16):
        filled = products.Slices(places, first.to(dtype), down.to(dtype))
        assert (filled.counts, filled.rows, filled.taken) == ([704, 48, 928], 704 + 48 + 928, 1633)
        assert filled.spots is not None and filled.gaps is not None
        assert filled.spots.tolist() == [*range(700), *range(704, 737), *range(752, 1652)]
        assert filled.gaps.tolist() == [*range(700, 704), *range(737, 752), *range(1652, 1680)]
        few = products.Slices(places[675:710], first.to(dtype), down.to(dtype))
        assert few.spots is None and few.rows == few.taken
    assert products.Slices(places, first[:, :8], down[..., :4]).spots is None  # small products
    assert products.Slices(places, first.double(), down.double()).spots is None
    monkeypatch.setattr(products.many_rows, "is_faster", lambda: False)
    monkeypatch.setattr(products.many_rows, "takes_bfloat16", lambda: False)
    assert products.Slices(places, first, down).spots is None
    assert products.Slices(places, first.bfloat16(), down.bfloat16()).spots is None


def test_who_is_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself only where a GPU makes it one kernel: in bfloat16, in rows of 16 bytes."""
    cuda, cpu, weight = torch.device("cuda"), torch.device("cpu"), torch.zeros(E, 24, D, device="meta")
    monkeypatch.setattr(dispatch, "_on_the_device", lambda device: True)
    assert groups("auto", cuda, torch.bfloat16, weight) and groups("grouped", cpu, torch.float32, weight)
    assert not groups("auto", cuda, torch.float32, weight) and not groups("auto", cpu, torch.bfloat16, weight)
    assert not groups("auto", cuda, torch.bfloat16, weight[:, :20]) and not groups(
        "slices", cuda, torch.bfloat16, weight
    )
    monkeypatch.setattr(dispatch, "_on_the_device", lambda device: False)
    assert not groups("auto", cuda, torch.bfloat16, weight) and groups("grouped", cuda, torch.bfloat16, weight)


def test_what_cannot_be_grouped_says_why() -> None:
    with pytest.raises(
        ValueError, match="dispatch='grouped' takes rows of whole 16 bytes: .* multiples of 8; use slices"
    ):
        groups("grouped", torch.device("cpu"), torch.bfloat16, torch.zeros(E, 20, D))
    with pytest.raises(ValueError, match="dispatch must be one of auto, slices, grouped, got 'sorted'"):
        SwigluExperts(D, HIDDEN, E, dispatch="sorted")  # type: ignore[arg-type]
