"""Norms against their formulas in float64, and how they stand in a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mm.decoder.decoder import Block, Layer
from mm.decoder.norms import FullNorm, HeadNorm, LayerNorm, RMSNorm

# float32 keeps 24 bits, 6e-8; a mean over some ten numbers and a root add a few of those.
ULPS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6}


def spread(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.5)
    return module


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_its_formula(offset):
    torch.manual_seed(0)
    norm, x = spread(RMSNorm(7, eps=0.1, offset=offset)), torch.randn(2, 3, 7)
    big = x.double()
    weight = norm.get_parameter("weight").double()
    expected = big / (big.square().mean(-1, keepdim=True) + 0.1).sqrt() * (offset + weight)
    torch.testing.assert_close(norm(x).double(), expected, **ULPS)


@pytest.mark.parametrize("dtype,offset", [(torch.float32, 0.0), (torch.float32, 1.0), (torch.bfloat16, 0.0)])
def test_gradients_of_rms_norm_are_those_of_its_formula(dtype, offset):
    torch.manual_seed(0)
    norm, x = spread(RMSNorm(7, eps=0.1, offset=offset)), torch.randn(2, 3, 7).to(dtype).requires_grad_()
    grad, big = torch.randn(2, 3, 7).to(dtype), x.detach().double().requires_grad_()
    norm(x).backward(grad)
    weight = norm.get_parameter("weight").detach().double().requires_grad_()
    (big / (big.square().mean(-1, keepdim=True) + 0.1).sqrt() * (offset + weight)).backward(grad.double())
    found = norm.get_parameter("weight").grad
    assert big.grad is not None and weight.grad is not None and found is not None
    # Of bfloat16 x's gradient is rounded to 8 bits at the end, and that alone; the weight's is made in float32.
    torch.testing.assert_close(x.grad, big.grad.to(dtype), **(ULPS if dtype == torch.float32 else {}))
    torch.testing.assert_close(found, weight.grad.float(), atol=5e-6, rtol=5e-6)


def test_a_frozen_norm_passes_gradients_on():
    norm, x = RMSNorm(5).requires_grad_(False), torch.randn(3, 5, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.get_parameter("weight").grad is None


def test_both_forms_of_rms_norm_start_as_the_same_function():
    x = torch.randn(3, 5)
    assert torch.equal(RMSNorm(5)(x), RMSNorm(5, offset=1.0)(x))
    assert RMSNorm(5, offset=1.0).weight.abs().max() == 0


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias):
    torch.manual_seed(0)
    ours, theirs, x = spread(LayerNorm(7, 1e-3, bias)), nn.LayerNorm(7, 1e-3, bias=bias), torch.randn(4, 7)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), **ULPS)


def test_head_norm_has_a_weight_for_each_head_and_full_norm_one_root_for_all():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    head = spread(HeadNorm(4, 5, eps=1e-3))
    for h in range(4):
        alone = LayerNorm(5, 1e-3, bias=False)
        alone.weight.data = head.get_parameter("weight").data[h]
        torch.testing.assert_close(head(x)[:, :, h], alone(x[:, :, h]), **ULPS)
    full = FullNorm(20)
    torch.testing.assert_close(full(x).flatten(2), RMSNorm(20)(x.flatten(2)), **ULPS)
    moved = x.clone()
    moved[:, :, 0] *= 3
    assert (full(moved) - full(x))[:, :, 1:].abs().max() > 0.1  # the heads share their scale
    assert torch.equal(head(moved)[:, :, 1:], head(x)[:, :, 1:])


@pytest.mark.parametrize("norm", [RMSNorm(64), LayerNorm(64), HeadNorm(1, 64), FullNorm(64)])
def test_bfloat16_is_normalised_in_float32(norm):
    """The result is the float32 one, rounded once."""
    x = (torch.randn(3, 1, 64) * 100 + 30).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


class Doubles(nn.Module):
    """A mixer and an FFN at once: what it was given is on record."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, h, *context):
        self.seen.append(h)
        return 2 * h


def layer_of(arrangement, scale=1.0):
    mixer, ffn = Doubles(), Doubles()
    layer = Layer(6, mixer, ffn, Block(RMSNorm, arrangement, scale))
    for number, norm in enumerate(m for m in layer.modules() if isinstance(m, RMSNorm)):
        nn.init.constant_(norm.weight, 1.0 + number)
    return layer, mixer, ffn


def expected_of(arrangement, x, scale):
    """The four arrangements, written out; the norms' weights are 1, 2, 3, 4 in the order of the layer."""

    def n(h, weight):
        return weight * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    if arrangement == "pre":
        y = x + scale * 2 * n(x, 1)
        return y + scale * 2 * n(y, 2)
    if arrangement == "post":
        y = x + scale * n(2 * x, 1)
        return y + scale * n(2 * y, 2)
    if arrangement == "sandwich":
        y = x + scale * n(2 * n(x, 1), 2)
        return y + scale * n(2 * n(y, 3), 4)
    return x + scale * (2 * n(x, 1) + 2 * n(x, 1))


@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("arrangement", ["pre", "post", "sandwich", "parallel"])
def test_where_the_norms_stand(arrangement, scale):
    torch.manual_seed(0)
    layer, mixer, ffn = layer_of(arrangement, scale)
    x = torch.randn(2, 3, 6)
    y, routing = layer(x, torch.ones(2, 3, dtype=torch.bool), None, None, 0)
    torch.testing.assert_close(y, expected_of(arrangement, x, scale), **ULPS)
    assert routing is None
    if arrangement == "parallel":
        assert mixer.seen[0] is ffn.seen[0]
    norms = {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[arrangement]
    assert sum(isinstance(m, RMSNorm) for m in layer.modules()) == norms  # none that nobody trains


def test_a_layer_without_a_feed_forward_part():
    mixer = Doubles()
    layer, x = Layer(6, mixer, None, Block()), torch.randn(2, 3, 6)
    y, routing = layer(x, torch.ones(2, 3, dtype=torch.bool), None, None, 0)
    torch.testing.assert_close(y, x + 2 * layer.mixer_norm(x))
    assert routing is None and [name for name, _ in layer.named_parameters()] == ["mixer_norm.weight"]
    with pytest.raises(ValueError, match="parallel layer needs a feed-forward part"):
        Layer(6, mixer, None, Block(arrangement="parallel"))
