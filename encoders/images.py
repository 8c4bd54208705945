"""What towers around ready-made 2-D image models share: patches folded back to images, grids, frozen weights.

`M` media items, `N` tokens of an item, `C` features of a token, `p` the side of a patch in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.types import Encoder, Grid, Reduction, Tokens, grid_positions


class ImageTower(Encoder):
    """An image model read as an encoder of patches; a subclass says how in `feature_map`.

    tokens.values (M, N, 3 * p * p) uint8 -> (M, N', out_dim) in the weights' dtype. The patches of an item are folded
    back into its image (a video: into its frames, which the model sees one by one), normalised with the model's own
    mean and std, and filled up below and to the right with the mean colour to whole cells of the model's stride; a cell
    is a token. Items of one grid run together; so padding and the order of a batch never reach the model.

    stride       pixels a side of the model's feature cells; must be a multiple of `p`, as grids only shrink
    image_size   (H, W) pixels if the model takes one size only
    freeze       no gradients, and evaluation mode (batch norm, dropout) even while the parent trains

    Raises ValueError for an `in_dim` that is no RGB patch, for a stride that patches do not divide (naming both) and,
    when run, for an image whose size the model cannot take.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_dim: int,
        model: nn.Module,
        name: str,
        width: int,
        stride: int,
        mean: Seq[float],
        std: Seq[float],
        image_size: tuple[int, int] | None = None,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.patch = patch_side(in_dim)
        if stride % self.patch:
            raise ValueError(
                f"patches of {self.patch} px do not divide the stride of {name}, {stride} px: "
                f"set the image tokenizer's patch to {stride} or a divisor of it"
            )
        self.out_dim = width
        self.reduction = Reduction((1, stride // self.patch, stride // self.patch))
        self.name, self.stride, self.image_size, self.freeze = name, stride, image_size, freeze
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.model = model.requires_grad_(False) if freeze else model
        self.train(self.training)

    def feature_map(self, images: Tensor) -> Tensor:
        """(m, 3, H, W) normalised -> (m, C, H / stride, W / stride)."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> ImageTower:
        super().train(mode)
        if self.freeze:
            self.model.eval()
        return self

    def forward(self, tokens: Tokens) -> Tokens:
        groups: dict[Grid, list[int]] = {}
        for item, (t, h, w) in enumerate(tokens.grid.tolist()):
            groups.setdefault((t, h, w), []).append(item)
        if not groups:
            return self._nothing(tokens)
        outputs = []
        for grid, items in groups.items():
            values = tokens.values if len(groups) == 1 else tokens.values[items]
            outputs.append((items, self.reduction(grid), self._encode(values[:, : math.prod(grid)], grid)))
        return assemble(outputs)

    def _encode(self, values: Tensor, grid: Grid) -> Tensor:
        """Items of one grid, (m, t * h * w, 3 * p * p) uint8 -> (m, t' * h' * w', C)."""
        images = (fold(values, grid, self.patch).float() / 255 - self.mean) / self.std
        t, h, w = self.reduction(grid)
        size = (h * self.stride, w * self.stride)
        images = F.pad(images, (0, size[1] - images.shape[-1], 0, size[0] - images.shape[-2]))
        if self.image_size not in (None, size):
            raise ValueError(
                f"{self.name} takes images of {self.image_size} px (height, width), got {size}: set the image "
                f"tokenizer's size to {list(self.image_size or ())}, or build the encoder for another size"
            )
        images = images.to(next(self.model.parameters()).dtype)
        if images.is_cpu:  # convolutions, their norms and pools then work on rows of channels: 1.4 times as fast
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.feature_map(images)
        if features.shape[-2:] != (h, w):
            raise ValueError(
                f"{self.name} made {tuple(features.shape[-2:])} cells of an image of {size} px, and its stride of "
                f"{self.stride} px promises {(h, w)}: its convolutions drop the border, so it cannot give tokens"
            )
        return features.flatten(2).transpose(1, 2).reshape(len(values), t * h * w, -1)

    def _nothing(self, tokens: Tokens) -> Tokens:
        """No items: run a small blank image and keep none of it, so that gradients are zeros and not missing.

        Ready-made models do not take empty batches (`reshape(0, h, w, -1)`). Evaluation mode keeps the blank out of
        batch-norm statistics.
        """
        side = 2 * self.stride // self.patch
        grid: Grid = (1, side, side)
        if self.image_size is not None:
            grid = (1, self.image_size[0] // self.patch, self.image_size[1] // self.patch)
        blank = tokens.values.new_zeros(1, math.prod(grid), tokens.values.shape[-1])
        training = self.model.training
        self.model.eval()
        features = self._encode(blank, grid)[:0, :0]
        self.model.train(training)
        return Tokens(features, tokens.positions[:, :0], tokens.mask[:, :0], tokens.grid)


def assemble(outputs: list[tuple[list[int], Grid, Tensor]]) -> Tokens:
    """Groups of (items, their grid, features (m, n, C)) -> Tokens of all items in their order, padded with zeros."""
    device = outputs[0][2].device
    if len(outputs) == 1:
        items, grid, values = outputs[0]
        positions = grid_positions(grid).to(device).expand(len(items), -1, -1)
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=device)
        return Tokens(values, positions, mask, torch.tensor([grid], device=device).expand(len(items), -1))
    count, length = sum(len(items) for items, _, _ in outputs), max(values.shape[1] for _, _, values in outputs)
    result = Tokens(
        outputs[0][2].new_zeros(count, length, outputs[0][2].shape[-1]),
        torch.zeros(count, length, 3, dtype=torch.int64, device=device),
        torch.zeros(count, length, dtype=torch.bool, device=device),
        torch.zeros(count, 3, dtype=torch.int64, device=device),
    )
    for items, grid, values in outputs:
        length = values.shape[1]
        result.values[items, :length] = values
        result.positions[items, :length] = grid_positions(grid).to(device)
        result.mask[items, :length] = True
        result.grid[items] = torch.tensor(grid, device=device)
    return result


def patch_side(in_dim: int) -> int:
    """Pixels a side of an RGB patch of `in_dim` values."""
    side = math.isqrt(in_dim // 3)
    if side < 1 or 3 * side * side != in_dim:
        raise ValueError(f"in_dim must be 3 * patch * patch for an image encoder, got {in_dim}")
    return side


def fold(values: Tensor, grid: Grid, patch: int) -> Tensor:
    """Patches (m, t * h * w, 3 * p * p), channel first, in raster order -> images (m * t, 3, h * p, w * p)."""
    t, h, w = grid
    x = values.reshape(len(values) * t, h, w, 3, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), 3, h * patch, w * patch)


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a local file: `.safetensors`, or `.pt`, `.pth`, `.bin` read with `weights_only=True`.

    A training checkpoint's `state_dict` entry is taken for the whole. Raises ValueError naming the path.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"weights: there is no file {path} (give a local file, or leave weights out for random ones)")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if file.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"weights: {path} must end in .safetensors, .pt, .pth or .bin")
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Fills every parameter and buffer of `model`. Raises ValueError naming what is missing, too much or misshapen."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape),
    }
    found = [f"{what}: {', '.join(keys[:8])}{' ...' if keys[8:] else ''}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"weights: {path} does not fit the model; {'; '.join(found)}")
    model.load_state_dict(state)
