"""What every bridge config promises; a new file in configs/bridges is covered without an edit here."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from mm.types import Bridge, BridgeFactory, Grid, Tokens, grid_positions

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "bridges").glob("*.yaml"))
IN_DIM, OUT_DIM = 12, 32
GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


def item(grid: Grid) -> Tokens:
    return Tokens.of_grid(torch.randn(math.prod(grid), IN_DIM), grid)


def build(path: Path) -> Bridge:
    torch.manual_seed(0)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=BridgeFactory)
    factory: BridgeFactory = parser.instantiate(parser.parse_object({"part": yaml.safe_load(path.read_text())})).part
    return factory(IN_DIM, OUT_DIM)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def bridge(request: pytest.FixtureRequest) -> Bridge:
    return build(request.param)


@settings(max_examples=25, deadline=None)
@given(grids=GRIDS)
def test_any_mix_of_grids(bridge: Bridge, grids: list[Grid]) -> None:
    """The grid is reduction(grid), and neither padding nor order reaches a result."""
    items = [item(grid) for grid in grids]
    with torch.no_grad():
        out, reverse = bridge(Tokens.stack(items)), bridge(Tokens.stack(items[::-1]))
        assert out.values.shape[-1] == OUT_DIM
        for i, (one, size) in enumerate(zip(items, grids, strict=True)):
            grid = bridge.reduction(size)
            count = math.prod(grid)
            assert tuple(out.grid[i].tolist()) == grid
            assert out.mask[i].tolist() == [True] * count + [False] * (out.mask.shape[1] - count)
            assert torch.equal(out.positions[i, :count], grid_positions(grid))
            alone = bridge(Tokens.stack([one])).values[0]
            assert len(alone) == count
            # float32 sums in another order (other GEMM shapes), through at most 2 layers of values of order 1
            torch.testing.assert_close(out.values[i, :count], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(reverse.values[-1 - i, :count], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_no_items_give_zero_gradients_and_not_missing_ones(bridge: Bridge, length: int) -> None:
    none = Tokens(
        torch.zeros(0, length, IN_DIM),
        torch.zeros(0, length, 3, dtype=torch.int64),
        torch.zeros(0, length, dtype=torch.bool),
        torch.ones(0, 3, dtype=torch.int64),
    )
    out = bridge(none)
    assert out.values.shape[0] == 0 and out.values.shape[-1] == OUT_DIM and out.grid.shape == (0, 3)
    assert out.values.shape[:2] == out.mask.shape == out.positions.shape[:2]
    gradients = torch.autograd.grad(out.values.sum() * 0, list(bridge.parameters()))  # raises if one is missing
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_every_parameter_and_the_input_have_a_finite_gradient(bridge: Bridge) -> None:
    tokens = Tokens.stack([item((2, 3, 4)), item((1, 3, 3))])
    tokens = tokens.with_values(tokens.values.requires_grad_())
    out = bridge(tokens)
    weights = torch.randn(out.values.shape) * out.mask[..., None]  # a plain sum has no gradient through a LayerNorm
    inputs = {"input": tokens.values, **dict(bridge.named_parameters())}
    gradients = dict(zip(inputs, torch.autograd.grad((out.values * weights).sum(), list(inputs.values())), strict=True))
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.count_nonzero() > 0, name
    assert (gradients["input"][0] != 0).any(-1).all()  # every token is read
    assert (gradients["input"][1, 9:] == 0).all()  # and padding is not


def test_weights_in_half_precision_take_float32_pixels(bridge: Bridge) -> None:
    """A tower in bfloat16 behind NoEncoder, whose features are float32."""
    half = copy.deepcopy(bridge).to(torch.bfloat16)
    assert half(Tokens.stack([item((1, 2, 3))])).values.dtype == torch.bfloat16
