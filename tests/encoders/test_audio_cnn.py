from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mm.encoders.audio_cnn import AudioCNNEncoder, Convolution
from mm.types import Tokens


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_the_convolution_is_conv1d(stride: int, frames: int) -> None:
    torch.manual_seed(0)
    conv = Convolution(5, 6, stride)
    x = torch.randn(2, frames, 5)
    kernel = conv.linear.weight.unflatten(1, (3, 5)).transpose(1, 2)
    expected = F.conv1d(x.transpose(1, 2), kernel, conv.linear.bias, stride=stride, padding=1).transpose(1, 2)
    torch.testing.assert_close(conv(x), expected, atol=1e-6, rtol=1e-5)  # float32 sums of 15 terms, another order


def test_sound_behind_the_end_is_not_heard() -> None:
    """The trap: a bias makes padding non-zero after the first convolution, and the second would read it."""
    torch.manual_seed(0)
    encoder = AudioCNNEncoder(5, width=8, stride=4, layers=0)
    short, long = (Tokens.of_grid(torch.randn(n, 5), (n, 1, 1)) for n in (6, 23))
    batch = Tokens.stack([short, long])
    batch.values[0, 6:] = 1e3  # padding is anything
    together, alone = encoder(batch).values[0, :2], encoder(Tokens.stack([short])).values[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)  # float32 sums in another order


def test_arguments_and_grids_are_checked() -> None:
    with pytest.raises(ValueError, match="stride must be a power of two, got 3"):
        AudioCNNEncoder(5, stride=3)
    encoder = AudioCNNEncoder(12, width=8, layers=0)
    with pytest.raises(ValueError, match=r"grids \(t, 1, 1\), got \[\[1, 2, 2\]\]"):
        encoder(Tokens.stack([Tokens.of_grid(torch.randn(4, 12), (1, 2, 2))]))
