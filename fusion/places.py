"""Where a token of a media item stands, as features.

`M` media items, `N` tokens of an item.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mm.types import Tokens


def fourier(tokens: Tokens, bands: int) -> Tensor:
    """(M, N, 6 * bands) float32: sin and cos of pi, 2 pi, ... bands pi times the place in [-1, 1] on each axis.

    Fourier features of the place in the grid, as in Perceiver (Jaegle et al. 2021, arXiv:2103.03206, section 3.2).
    """
    place = (2 * tokens.positions + 1) / tokens.grid[:, None] - 1  # the middle of a cell
    frequencies = torch.arange(1, bands + 1, device=place.device) * math.pi
    angles = (place[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
