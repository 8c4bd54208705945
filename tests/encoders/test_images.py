from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mm.encoders.images import ImageTower, fold, patch_side
from mm.types import Tokens


class Grey(ImageTower):
    """A toy: the mean of every cell of the stride; with `border` cells lost at the right, as by an unpadded CNN."""

    def __init__(self, in_dim: int, stride: int = 4, border: int = 0, **options: bool) -> None:
        model = nn.Sequential(nn.AvgPool2d(stride), nn.Dropout(0.5), nn.BatchNorm2d(3, affine=True))
        super().__init__(in_dim, model, "toy", 3, stride, (0.5,) * 3, (0.5,) * 3, **options)  # type: ignore[arg-type]
        self.border = border

    def feature_map(self, images: Tensor) -> Tensor:
        self.images = images
        cells = self.model(images)
        return cells[..., : cells.shape[-1] - self.border]


def patches(frames: Tensor, patch: int) -> Tokens:
    """(t, 3, H, W) -> Tokens, written out by slices."""
    t, _, height, width = frames.shape
    rows, columns = height // patch, width // patch
    values = torch.stack(
        [
            frames[i, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].reshape(-1)
            for i in range(t)
            for y in range(rows)
            for x in range(columns)
        ]
    )
    return Tokens.of_grid(values, (t, rows, columns))


def test_folding_gives_the_images_back() -> None:
    frames = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    tokens = patches(frames, 2)
    assert torch.equal(fold(tokens.values[None], (2, 3, 4), 2), frames)


def test_an_image_is_filled_up_with_the_mean_colour() -> None:
    tower = Grey(12, stride=4).eval()
    frames = torch.full((1, 3, 6, 6), 255, dtype=torch.uint8)
    out = tower(Tokens.stack([patches(frames, 2)]))
    assert out.grid.tolist() == [[1, 2, 2]] and tower.images.shape == (1, 3, 8, 8)
    assert tower.images[..., :6, :6].eq(1).all() and tower.images[..., 6:, :].eq(0).all()


def test_frames_do_not_see_one_another() -> None:
    tower = Grey(12).eval()
    frames = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    changed = frames.clone()
    changed[1] = 255 - changed[1]
    before, after = (tower(Tokens.stack([patches(x, 2)])).values[0] for x in (frames, changed))
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


def test_a_frozen_tower_stays_in_evaluation_mode() -> None:
    tower = Grey(12, freeze=True)
    parent = nn.ModuleDict({"tower": tower}).train()
    assert parent.training and tower.training and not any(module.training for module in tower.model.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    tower(Tokens.stack([patches(torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), 2)]))
    assert int(tower.model[2].num_batches_tracked) == 0  # type: ignore[index]
    thawed = Grey(12).train()
    assert all(module.training for module in thawed.modules())


def test_a_map_of_another_size_than_the_stride_says_is_refused() -> None:
    with pytest.raises(ValueError, match=r"toy made \(2, 1\) cells of an image of \(8, 8\) px, and its stride of 4 px"):
        Grey(12, border=1).eval()(Tokens.stack([patches(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 2)]))


def test_patch_and_stride_are_named_where_they_do_not_divide() -> None:
    with pytest.raises(ValueError, match="patches of 3 px do not divide the stride of toy, 4 px"):
        Grey(27)
    with pytest.raises(ValueError, match="patches of 8 px do not divide the stride of toy, 4 px"):
        Grey(192)


@pytest.mark.parametrize("dim", [0, 80, 128, 3 * 15])
def test_a_width_that_is_no_patch_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"in_dim must be 3 \\* patch \\* patch for an image encoder, got {dim}"):
        patch_side(dim)
