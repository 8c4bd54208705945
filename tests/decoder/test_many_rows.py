"""Products of many rows by oneDNN: exact, with every gradient, only where they gain, and torch as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder import many_rows as module
from mm.decoder.few_rows import Linear
from mm.decoder.many_rows import LEAST, SETTING, linear, onednn_if


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is faster, and for products of any size."""
    monkeypatch.setattr(module, "is_faster", lambda: True)
    monkeypatch.setattr(module, "LEAST", 1)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    yield
    assert torch.get_float32_matmul_precision() == "highest" and SETTING.fp32_precision == "ieee"


def rounds() -> bool:
    """Whether this processor's oneDNN rounds to bfloat16 where it may; then nothing here would be exact."""
    a, b = torch.randn(2, 256, 256, dtype=torch.float64)
    with module.onednn():
        return not torch.allclose((a.float() @ b.float()).double(), a @ b, atol=1e-3, rtol=0)


exactly = pytest.mark.skipif(rounds(), reason="this processor's oneDNN rounds to bfloat16, so mm does not go there")


@exactly
@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 33), (0, 33)])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    inputs = [torch.randn(shape), torch.randn(48, 33), *([torch.randn(48)] if bias else [])]
    of_mm = [tensor.clone().requires_grad_() for tensor in inputs]
    of_torch = [tensor.double().requires_grad_() for tensor in inputs]
    y, expected = linear(*of_mm), F.linear(*of_torch)
    assert type(y.grad_fn).__name__ == "_LinearBackward" or not y.numel()
    grad = torch.randn(*shape[:-1], 96)[..., ::2]  # neither contiguous
    found = torch.autograd.grad(y, of_mm, grad)
    exact = torch.autograd.grad(expected, of_torch, grad.double())
    for one, other in zip([y, *found], [expected, *exact], strict=True):
        # Float32 sums of at most 48 products of order 1.
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)


@exactly
@pytest.mark.usefixtures("faster")
def test_a_gradient_that_is_one_number_everywhere() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    linear(x, weight).sum().backward()  # stride 0
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(6, 8), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("faster")
def test_a_weight_used_twice_and_one_that_is_frozen() -> None:
    weight, frozen = torch.randn(8, 8, dtype=torch.float32, requires_grad=True), torch.randn(8, 8)
    x = torch.eye(8)
    linear(linear(linear(x, weight), frozen), weight).sum().backward()
    twice = weight.detach().clone().requires_grad_()
    F.linear(F.linear(F.linear(x, twice), frozen), twice).sum().backward()
    assert weight.grad is not None and twice.grad is not None and frozen.grad is None
    # bfloat16's rounding, where this processor rounds.
    torch.testing.assert_close(weight.grad, twice.grad, atol=0.3 if rounds() else 1e-4, rtol=1e-5)


@exactly
@pytest.mark.usefixtures("faster")
def test_gradients_of_gradients() -> None:
    def penalty(product: object) -> Tensor:
        torch.manual_seed(0)
        x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=1e-3)  # numbers of order 1e3


@pytest.mark.usefixtures("faster")
def test_the_setting_lasts_for_the_product_alone_even_if_it_fails() -> None:
    with pytest.raises(RuntimeError):
        linear(torch.randn(4, 5), torch.randn(4, 6))
    with onednn_if(torch.randn(4, 5), LEAST):
        assert SETTING.fp32_precision == "bf16"
    assert SETTING.fp32_precision != "bf16" and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("faster")
def test_what_the_user_has_set_stays() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with onednn_if(torch.randn(4, 5), LEAST):
            assert SETTING.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("tensor", [torch.randn(4, 5).bfloat16(), torch.randn(4, 5).double()])
@pytest.mark.usefixtures("faster")
def test_other_dtypes_go_where_torch_sends_them(tensor: Tensor) -> None:
    with onednn_if(tensor, LEAST):
        assert SETTING.fp32_precision != "bf16"
    weight = torch.randn(3, 5).to(tensor.dtype).requires_grad_()
    assert type(linear(tensor, weight).grad_fn).__name__ != "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(4, 5), torch.randn(3, 5)).dtype == torch.bfloat16


def test_where_it_is_not_faster_or_the_product_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(256, 256)
    monkeypatch.setattr(module, "is_faster", lambda: False)
    assert type(layer(torch.randn(512, 256)).grad_fn).__name__ != "_LinearBackward"
    monkeypatch.setattr(module, "is_faster", lambda: True)
    assert type(layer(torch.randn(512, 256)).grad_fn).__name__ == "_LinearBackward"
    assert type(layer(torch.randn(511, 256)).grad_fn).__name__ != "_LinearBackward"


def test_it_is_chosen_for_being_exact_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for quick, slow, expected in [(1.0, 1.4, False), (1.0, 1.6, True)]:
        times = iter([quick, slow])
        monkeypatch.setattr(module, "_seconds", lambda work, times=times: next(times))
        assert module.is_faster.__wrapped__() == (expected and not rounds())
