from __future__ import annotations

import pytest
import torch

from mm.fusion.projector import LinearProjector, MLPProjector, merge, merge_ragged
from mm.types import Grid, Reduction, Tokens


def numbered(grid: Grid, start: int = 1) -> Tokens:
    t, h, w = grid
    return Tokens.of_grid(torch.arange(start, start + t * h * w, dtype=torch.float32)[:, None], grid)


def test_a_cell_holds_its_neighbours_in_raster_order() -> None:
    out = merge(Tokens.stack([numbered((1, 2, 4))]), Reduction((1, 2, 2)))
    assert out.values.tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]]]
    out = merge(Tokens.stack([numbered((2, 1, 2))]), Reduction((2, 1, 1)))
    assert out.values.tolist() == [[[1, 3], [2, 4]]]


def test_odd_sizes_are_filled_with_zeros() -> None:
    out = merge(Tokens.stack([numbered((1, 3, 3))]), Reduction((1, 2, 2)))
    assert out.values.tolist() == [[[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]]
    assert out.grid.tolist() == [[1, 2, 2]]


def test_ragged_grids_go_to_their_own_cells() -> None:
    out = merge(Tokens.stack([numbered((1, 3, 2)), numbered((1, 2, 4), 11)]), Reduction((1, 2, 2)))
    assert out.values.tolist() == [[[1, 2, 3, 4], [5, 6, 0, 0]], [[11, 12, 15, 16], [13, 14, 17, 18]]]
    assert out.positions.tolist() == [[[0, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]]


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 3), (3, 2, 1), (2, 3, 5)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (4, 6, 5)])
def test_the_view_and_the_scatter_agree(grid: Grid, stride: Grid) -> None:
    reduction = Reduction(stride)
    tokens = Tokens.stack([numbered(grid), numbered(grid, 1000)])
    fast = merge(tokens, reduction)
    assert torch.equal(fast.values, merge_ragged(tokens, fast.grid, fast.mask.shape[1], reduction))


def test_padding_is_not_merged() -> None:
    """The trap: padding stands at position (0, 0, 0), a real cell."""
    batch = Tokens.stack([numbered((1, 1, 2)), numbered((1, 2, 2))])
    batch.values[0, 2:] = 1e9
    assert merge(batch, Reduction((1, 2, 2))).values.tolist() == [[[1, 2, 0, 0]], [[1, 2, 3, 4]]]
    alone = Tokens(*(x[:1] for x in (batch.values, batch.positions, batch.mask, batch.grid)))
    assert merge(alone, Reduction((1, 2, 2))).values.tolist() == [[[1, 2, 0, 0]]]


def test_widths() -> None:
    bridge = MLPProjector(3, 8, shuffle=(1, 2, 2), hidden=5)
    assert bridge.up.weight.shape == (5, 12) and bridge.down.weight.shape == (8, 5)
    assert MLPProjector(3, 8).up.out_features == 8
    assert LinearProjector(3, 8).linear.weight.shape == (8, 3)


def test_places_tell_equal_features_apart() -> None:
    grid = (3, 1, 2)
    equal = Tokens.stack([Tokens.of_grid(torch.ones(6, 4), grid), Tokens.of_grid(torch.ones(6, 4), grid)])
    plain, placed = MLPProjector(4, 8, norm=True)(equal).values, MLPProjector(4, 8, norm=True, bands=2)(equal).values
    assert torch.equal(plain, plain[:, :1].expand_as(plain))
    assert len(placed[0].unique(dim=0)) == 6 and torch.equal(placed[0], placed[1])
    with pytest.raises(ValueError, match="bands must be at least 0, got -1"):
        MLPProjector(4, 8, bands=-1)


def test_a_shuffle_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shuffle must be three numbers .* got \(1, 0, 2\)"):
        MLPProjector(3, 8, shuffle=(1, 0, 2))
