"""Muon: matrices move by their momentum made orthogonal, everything else as by AdamW."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from mm.decoder.ffn.activations import Plain
from mm.decoder.ffn.experts import Experts
from mm.testing import tiny_model
from mm.training.muon import COEFFICIENTS, Muon, as_matrices, matrices_of, orthogonal
from mm.training.optim import OptimConfig

NEAR = 0.13  # how far from 1 five steps leave a singular value of at least 1e-3 of the norm: it is the polynomials' own
ROUNDING: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}  # of some fifteen float32 products, of numbers up to 1


def exact(x: Tensor) -> Tensor:
    """What the polynomials make of each singular value, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True) / 1.01
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return (u @ torch.diag_embed(s) @ v).to(x.dtype)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 9), (16, 64), (64, 64)])
def test_singular_values_become_one(size: tuple[int, int]) -> None:
    rows, columns = size
    u, _ = torch.linalg.qr(torch.randn(5, rows, rows))
    v, _ = torch.linalg.qr(torch.randn(5, columns, rows))
    spread = torch.logspace(0, -2.5, rows) if rows > 1 else torch.ones(1)
    x = 37.0 * u @ torch.diag(spread) @ v.mT
    y = orthogonal(x)
    torch.testing.assert_close(y, exact(x), **ROUNDING)
    assert torch.linalg.svdvals(y).sub(1).abs().max() < NEAR


def test_what_has_no_gradient_has_no_direction() -> None:
    x = torch.randn(3, 4, 8)
    x[1] = 0
    y = orthogonal(x)
    assert y.isfinite().all() and not y[1].any()
    torch.testing.assert_close(y[[0, 2]], orthogonal(x[[0, 2]]), **ROUNDING)


def moved(weight: Tensor, gradients: list[Tensor], lr: float, decay: float, momentum: float = 0.95) -> Tensor:
    """Of one matrix, written out."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        update = exact(momentum * mean + (1 - momentum) * gradient)
        weight = weight * (1 - lr * decay) - lr * 0.2 * max(weight.shape) ** 0.5 * update
    return weight


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 4, 8), (3, 8, 4), (8, 2, 3, 3)])
def test_steps_against_ones_written_out(shape: tuple[int, ...]) -> None:
    """A stack of experts is so many matrices, a convolution one of (out, in * taps)."""
    weight = nn.Parameter(torch.randn(shape))
    gradients = [torch.randn(shape) for _ in range(3)]
    pairs = zip(as_matrices(weight.detach()), zip(*map(as_matrices, gradients), strict=True), strict=True)
    expected = torch.stack([moved(one, list(several), 0.1, 0.5) for one, several in pairs]).view(shape)
    optimizer = Muon([weight], [], lr=0.1, weight_decay=0.5)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, **ROUNDING)


def test_which_weights_are_matrices() -> None:
    model = tiny_model(embedding_dim=8)
    names = matrices_of(model)
    for name in ("layers.0.mixer.qkv.weight", "layers.0.mixer.out.weight", "layers.1.ffn.experts.down"):
        assert f"decoder.{name}" in names
    assert any(name.startswith("towers.image.bridge.") for name in names)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert all(len(shapes[name]) >= 2 for name in names)
    for start in ("decoder.embed.", "embedding_head.", "slots.", "decoder.layers.1.ffn.router.", "decoder.norm."):
        assert any(name.startswith(start) for name in shapes)
        assert not any(name.startswith(start) for name in names)
    untied = tiny_model()
    untied.decoder.head.weight = nn.Parameter(untied.decoder.head.weight.detach().clone())
    assert "decoder.head.weight" not in matrices_of(untied)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.depthwise = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.places = nn.Parameter(torch.zeros(1, 5, 4))


def test_filters_of_single_channels_and_tables_of_places_are_none() -> None:
    assert matrices_of(Convolutions()) == ["dense.weight"]


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_everything_else_learns_by_adamw() -> None:
    model = tiny_model(embedding_dim=8)
    other = copy.deepcopy(model)
    config = OptimConfig(lr=1e-2, weight_decay=0.1, matrices="muon")
    optimizer = config.optimizer(model)
    assert isinstance(optimizer, Muon) and not optimizer._step_supports_amp_scaling
    stepped(model, optimizer, 3, seed=1)
    stepped(other, OptimConfig(lr=1e-2, weight_decay=0.1).optimizer(other), 3, seed=1)
    names = set(matrices_of(model))
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]) == (name not in names), name


def test_a_step_is_about_as_far_as_adamws() -> None:
    """So one learning rate serves both: 0.2 of it, root mean square (arXiv 2502.16982)."""
    weight = nn.Parameter(torch.zeros(48, 96))
    optimizer = Muon([weight], [], lr=1.0, weight_decay=0.0)
    weight.grad = torch.randn(48, 96)
    optimizer.step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2, rel=NEAR)


def test_a_saved_state_goes_on() -> None:
    config = OptimConfig(lr=1e-2, matrices="muon")
    model = tiny_model()
    optimizer = config.optimizer(model)
    stepped(model, optimizer, 2, seed=1)
    other = copy.deepcopy(model)
    resumed = config.optimizer(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, resumed)):
        its.param_groups[0]["lr"] *= 0.5  # as a scheduler does
        stepped(one, its, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_weight_without_a_gradient_stays() -> None:
    experts = Experts(8, 4, num_experts=3, activation=Plain(), bias=False)
    linear = nn.Linear(8, 8)
    down = dict(experts.named_parameters())["down"]
    nn.init.normal_(down)
    before = down.detach().clone()
    optimizer = Muon([down, linear.weight], [{"params": [linear.bias]}], lr=0.1)
    linear.weight.grad, linear.bias.grad = torch.randn(8, 8), torch.randn(8)
    bias = linear.bias.detach().clone()
    optimizer.step()
    assert torch.equal(down, before) and not torch.equal(linear.bias, bias)


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_matrices_that_are_split_are_refused(one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh))
    with pytest.raises(ValueError, match="whole matrices .* split"):
        Muon([weight], [])
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().flatten()[:7])  # as FSDP of the first kind leaves it to a rank
    with pytest.raises(ValueError, match="whole matrices .* split"):
        OptimConfig(matrices="muon").optimizer(linear)


def test_where_no_matrix_learns_all_learns_by_adamw() -> None:
    norms, others = nn.LayerNorm(4), nn.LayerNorm(4)
    stepped(norms, OptimConfig(matrices="muon").optimizer(norms), 2, seed=1)
    stepped(others, OptimConfig().optimizer(others), 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(norms.parameters(), others.parameters(), strict=True))
