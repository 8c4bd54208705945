from __future__ import annotations

import pytest
import torch

from mm.encoders.none import NoEncoder
from mm.types import Tokens


def test_pixels_are_normalised_and_frames_pass() -> None:
    pixels = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    out = NoEncoder(3, mean=0.5, std=0.25)(Tokens.stack([Tokens.of_grid(pixels, (1, 1, 1))]))
    # 1e-6: float32 rounding of (x / 255 - mean) / std, which is computed as one multiply and one subtract
    torch.testing.assert_close(out.values[0], torch.tensor([[-2.0, -1.2, 2.0]]), atol=1e-6, rtol=0)
    assert pixels.tolist() == [[0, 51, 255]]  # the batch is not written to
    frames = torch.randn(4, 3)
    assert torch.equal(NoEncoder(3)(Tokens.stack([Tokens.of_grid(frames, (4, 1, 1))])).values[0], frames)


def test_a_std_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        NoEncoder(3, std=0)
