"""Images -> patches: the image is resized to a whole number of square patches, and each patch becomes one token.

Shape legend: `H`, `W` pixels; `h`, `w` patches; `p` the patch's side; `T` frames; `N = h * w` tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mm.types import Grid, Tokens


class ImageTokenizer:
    """uint8 (3, H, W) -> Tokens: values (N, 3*p*p) uint8, grid (1, h, w), N = h * w <= `max_tokens`.

    Size rule. Each side is rounded to the nearest multiple of the patch, and to at least one patch: an image is
    enlarged by less than half a patch a side, or to one patch. If that is more than `max_tokens` patches, the image is
    shrunk, keeping its aspect ratio as nearly as whole patches allow (native resolution within a budget, as in
    NaViT, arXiv 2307.06304). With `size` = (H, W), every image is resized to exactly that instead.

    A patch's values are channel-first, (3, p, p) flattened, which is the layout of `torch.nn.functional.fold`.
    Values stay uint8: encoders normalise, so that a loader worker moves a quarter of the bytes.
    """

    def __init__(self, patch: int = 14, max_tokens: int = 256, size: tuple[int, int] | None = None) -> None:
        if patch < 2:
            raise ValueError(f"patch={patch}: the side of a patch is at least 2 pixels")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: an image is at least 1 token")
        if size is not None:
            size = (int(size[0]), int(size[1]))
            if min(size) < patch or size[0] % patch or size[1] % patch:
                raise ValueError(f"size={size}: both sides must be positive multiples of patch={patch}")
            if size[0] * size[1] > max_tokens * patch * patch:
                tokens = size[0] * size[1] // patch**2
                raise ValueError(f"size={size} is {tokens} patches of {patch}: raise max_tokens={max_tokens}")
        self.patch = patch
        self.max_tokens = max_tokens
        self.size = size
        self.dim = 3 * patch * patch

    def grid_of(self, height: int, width: int) -> Grid:
        """The grid (1, h, w) of an image of `height` x `width` pixels."""
        if self.size is not None:
            return (1, self.size[0] // self.patch, self.size[1] // self.patch)
        return (1, *_fit(height / self.patch, width / self.patch, self.max_tokens))

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The pixels (H, W) that an image of `height` x `width` is resized to: decoding more of it is of no use."""
        _, h, w = self.grid_of(height, width)
        return h * self.patch, w * self.patch

    def resize(self, frames: Tensor, size: tuple[int, int], covered: tuple[float, float]) -> Tensor:
        """(T, 3, H, W) uint8 -> (T, 3, *size). `covered` is how many of its pixels (H, W) are the picture: a decoder
        that shrinks an image gives a whole number of them, and the last is then only partly it."""
        if covered == tuple(frames.shape[-2:]):
            if covered == size:
                return frames
            return interpolate(frames, size=size, mode="bicubic", antialias=True)
        # A hair more than exact, since the output's size is rounded down; what is beyond `size` is cut off.
        scale = [want / have * (1 + 1e-9) for want, have in zip(size, covered, strict=True)]
        resized = interpolate(frames, scale_factor=scale, mode="bicubic", antialias=True)
        return resized[..., : size[0], : size[1]]

    def measure(self, media: Tensor) -> Grid:
        _check(media)
        return self.grid_of(media.shape[1], media.shape[2])

    def count(self, media: Tensor) -> int:
        return math.prod(self.measure(media))

    def __call__(self, media: Tensor) -> Tokens:
        grid = self.measure(media)
        return Tokens.of_grid(self.patches(media[None], grid), grid)

    def patches(self, frames: Tensor, grid: Grid) -> Tensor:
        """(T, 3, H, W) uint8 -> (T*h*w, 3*p*p) uint8: frames resized to the grid's h x w patches and unfolded."""
        _, h, w = grid
        p = self.patch
        frames = self.resize(frames, (h * p, w * p), (frames.shape[-2], frames.shape[-1]))
        cells = frames.reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)  # (T, h, w, 3, p, p)
        return cells.reshape(-1, self.dim)


def _fit(height: float, width: float, budget: int) -> tuple[int, int]:
    """Whole (h, w) nearest to a size given in patches, with h * w <= budget."""
    full_h, full_w = max(1, math.floor(height + 0.5)), max(1, math.floor(width + 0.5))
    if full_h * full_w <= budget:
        return full_h, full_w
    scale = math.sqrt(budget / (height * width))
    # The ideal sides, height * scale and width * scale, fill the budget exactly. Of the whole sides around them that
    # fit, take the pair nearest in aspect ratio, then the one with more patches.
    candidates: set[tuple[int, int]] = set()
    for h in _around(height * scale, full_h, budget):
        for w in _around(width * scale, full_w, budget):
            candidates |= {(h, min(w, budget // h)), (min(h, budget // w), w)}
    return min(candidates, key=lambda hw: (abs(math.log(hw[0] * width / (hw[1] * height))), -hw[0] * hw[1], hw))


def _around(side: float, full: int, budget: int) -> set[int]:
    """The whole numbers beside `side`, from 1 to what the image has and the budget holds."""
    return {max(1, min(whole, full, budget)) for whole in (math.floor(side), math.ceil(side))}


def _check(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(
            f"an image is a uint8 tensor (3, H, W) with at least one pixel, not {image.dtype} {tuple(image.shape)}"
        )
