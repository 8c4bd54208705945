"""What every encoder config promises; a new file in configs/encoders is covered without an edit here."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from mm.types import Encoder, EncoderFactory, Grid, Tokens, grid_positions

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "encoders").glob("*.yaml"))
PATCH = 16
PROBES: list[tuple[int, bool, list[Grid]]] = [  # width, pixels, grids: ragged images and clips; 224 px; frames of sound
    (3 * PATCH * PATCH, True, [(1, 3, 5), (1, 4, 4), (2, 3, 2)]),
    (3 * PATCH * PATCH, True, [(1, 14, 14), (2, 14, 14)]),
    (80, False, [(33, 1, 1), (5, 1, 1), (64, 1, 1)]),
]


def item(grid: Grid, dim: int, pixels: bool) -> Tokens:
    shape = (math.prod(grid), dim)
    return Tokens.of_grid(torch.randint(0, 256, shape, dtype=torch.uint8) if pixels else torch.randn(shape), grid)


def no_items(like: Tokens, length: int) -> Tokens:
    return Tokens(
        like.values.new_zeros(0, length, like.values.shape[-1]),
        like.positions.new_zeros(0, length, 3),
        like.mask.new_zeros(0, length),
        like.grid.new_ones(0, 3),
    )


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def built(request: pytest.FixtureRequest) -> tuple[Encoder, list[Tokens]]:
    """The encoder in evaluation mode, and the items of the first probe that it does not refuse with a ValueError."""
    torch.manual_seed(0)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=EncoderFactory)
    make: EncoderFactory = parser.instantiate(
        parser.parse_object({"part": yaml.safe_load(request.param.read_text())})
    ).part
    for dim, pixels, grids in PROBES:
        items = [item(grid, dim, pixels) for grid in grids]
        try:
            encoder = make(dim).eval()
            with torch.no_grad():
                encoder(Tokens.stack(items))
        except ValueError:
            continue
        return encoder, items
    raise AssertionError("the encoder takes none of the probes")


def test_the_grid_is_the_reduction_of_the_grid(built: tuple[Encoder, list[Tokens]]) -> None:
    encoder, items = built
    with torch.no_grad():
        out = encoder(Tokens.stack(items))
    assert out.values.shape[-1] == encoder.out_dim
    for i, one in enumerate(items):
        t, h, w = one.grid.tolist()
        grid = encoder.reduction((t, h, w))
        count = math.prod(grid)
        assert tuple(out.grid[i].tolist()) == grid
        assert out.mask[i].tolist() == [True] * count + [False] * (out.mask.shape[1] - count)
        assert torch.equal(out.positions[i, :count], grid_positions(grid))


def test_neither_padding_nor_order_reaches_a_result(built: tuple[Encoder, list[Tokens]]) -> None:
    encoder, items = built
    with torch.no_grad():
        together, reverse = encoder(Tokens.stack(items)), encoder(Tokens.stack(items[::-1]))
        for i, one in enumerate(items):
            alone = encoder(Tokens.stack([one])).values[0]
            # float32 sums in another order (other GEMM shapes), through up to 18 layers of values of order 1
            torch.testing.assert_close(together.values[i, : len(alone)], alone, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(reverse.values[-1 - i, : len(alone)], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_no_items_give_zero_gradients_and_not_missing_ones(built: tuple[Encoder, list[Tokens]], length: int) -> None:
    encoder, items = built
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    out = encoder(no_items(items[0], length))
    encoder.eval()
    assert out.values.shape[0] == 0 and out.values.shape[-1] == encoder.out_dim
    assert out.values.shape[:2] == out.mask.shape == out.positions.shape[:2] and out.grid.shape == (0, 3)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(out.values.sum() * 0, parameters) if parameters else ()  # raises if one is missing
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())  # batch statistics


def test_every_parameter_has_a_finite_gradient(built: tuple[Encoder, list[Tokens]]) -> None:
    encoder, items = copy.deepcopy(built)
    parameters = dict(encoder.named_parameters())
    if not parameters:
        return
    with torch.no_grad():
        for parameter in parameters.values():  # residual branches may start at zero, and then hide what lies in them
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    out = encoder(Tokens.stack(items[:1]))
    weights = torch.randn(out.values.shape)  # a plain sum has no gradient through a LayerNorm
    gradients = torch.autograd.grad((out.values * weights).sum(), list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.isfinite().all() and gradient.count_nonzero() > 0, name
