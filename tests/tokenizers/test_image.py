"""Image patches: the count is a pure function of the size, within the budget, and the pixels come back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mm.tokenizers.image import ImageTokenizer

SIDES = st.integers(1, 400)


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.integers(2, 20), st.integers(1, 100))
def test_count_equals_tokens_and_keeps_the_budget(height: int, width: int, patch: int, budget: int) -> None:
    tokenizer = ImageTokenizer(patch=patch, max_tokens=budget)
    image = noise(height, width)
    tokens = tokenizer(image)
    assert tokenizer.count(image) == len(tokens) == math.prod(tokenizer.measure(image)) <= budget
    assert tuple(tokens.grid.tolist()) == tokenizer.measure(image) == tokenizer.grid_of(height, width)
    assert tokens.values.shape == (len(tokens), tokenizer.dim) and tokens.values.dtype == torch.uint8
    assert tokens.positions.shape == (len(tokens), 3) and bool(tokens.mask.all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_size_rule(height: int, width: int) -> None:
    tokenizer = ImageTokenizer(patch=14, max_tokens=256)
    _, h, w = tokenizer.grid_of(height, width)
    assert tokenizer.grid_of(width, height) == (1, w, h)  # no axis is preferred
    for side, cells in ((height, h), (width, w)):
        assert cells <= max(1, round(side / 14 + 1e-9))  # never enlarged beyond the nearest patch
    if min(h, w) > 4:
        # One patch more or less on a side of at least 5 is at most a quarter.
        assert abs(math.log(h / w / (height / width))) < math.log(1.25)
        if height * width > 256 * 14**2:
            assert h * w > 180  # most of the budget is used


def test_sizes_that_need_care() -> None:
    tokenizer = ImageTokenizer(patch=14, max_tokens=256)
    assert tokenizer.grid_of(1, 1) == (1, 1, 1)
    assert tokenizer.grid_of(1, 8000) == (1, 1, 256)
    assert tokenizer.grid_of(8000, 1) == (1, 256, 1)
    assert tokenizer.grid_of(20, 21) == (1, 1, 2)  # to the nearest multiple, halves up
    for side in (224, 448, 672, 1000):  # whatever the scale is rounded to
        assert tokenizer.grid_of(side, side) == (1, 16, 16)
    for height, width in ((1, 1), (8000, 1), (1, 8000)):
        assert len(tokenizer(noise(height, width))) == math.prod(tokenizer.grid_of(height, width))


def test_patches_fold_back_and_are_in_raster_order() -> None:
    image = noise(16, 24)
    tokens = ImageTokenizer(patch=8)(image)  # a whole number of patches: not resized
    columns = tokens.values.T[None].float()
    assert torch.equal(F.fold(columns, (16, 24), kernel_size=8, stride=8)[0], image.float())
    assert torch.equal(tokens.values[4].reshape(3, 8, 8), image[:, 8:, 8:16])
    assert tokens.positions[4].tolist() == [0, 1, 1]


def test_resize_is_antialiased() -> None:
    """Lines one pixel wide become grey when shrunk, and not black or white as by picking pixels."""
    lines = torch.zeros(3, 60, 60, dtype=torch.uint8)
    lines[:, :, ::2] = 255
    small = ImageTokenizer(patch=10, max_tokens=4)(lines).values.float()
    assert 120 < small.mean() < 135 and small.std() < 60  # all black and white would be 127.5


def test_fixed_size() -> None:
    tokenizer = ImageTokenizer(patch=16, max_tokens=8, size=(32, 64))
    for height, width in ((1, 1), (32, 64), (100, 7)):
        assert tokenizer.measure(noise(height, width)) == (1, 2, 4)
        assert len(tokenizer(noise(height, width))) == 8


@pytest.mark.parametrize(
    "options, says",
    [
        ({"patch": 1}, "patch=1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"patch": 14, "size": (224, 225)}, "224, 225"),
        ({"patch": 14, "size": (0, 14)}, "0, 14"),
        ({"patch": 14, "size": (448, 448)}, "1024 patches"),
    ],
)
def test_wrong_options(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ImageTokenizer(**options)


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3).byte(), torch.zeros(3, 0, 4).byte()])
def test_wrong_image(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 tensor"):
        ImageTokenizer().count(image)
