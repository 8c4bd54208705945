from __future__ import annotations

import pytest
import torch
from torch import nn

from mm.fusion.resampler import PerceiverResampler, ResamplerLayer
from mm.types import Tokens


def test_the_cross_attention_is_torchs_own() -> None:
    """Keys and values are the normed media and the normed latents together (Flamingo, figure 5)."""
    torch.manual_seed(0)
    layer = ResamplerLayer(16, heads=4)
    for parameter in layer.mlp[-1].parameters():
        nn.init.zeros_(parameter)
    latents, media = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    reference = nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    reference.in_proj_weight = nn.Parameter(torch.cat([layer.q.weight, layer.kv.weight]))
    reference.out_proj.weight = layer.out.weight
    query = layer.norm_latents(latents)
    keys = torch.cat([layer.norm_media(media), query], dim=1)
    visible = torch.cat([mask, torch.ones(2, 3, dtype=torch.bool)], dim=1)
    expected = latents + reference(query, keys, keys, key_padding_mask=~visible, need_weights=False)[0]
    # 1e-5: float32, another order of the same sums (fused against unfused attention)
    torch.testing.assert_close(layer(latents, media, visible[:, None, None]), expected, atol=1e-5, rtol=1e-5)


def test_the_layout_reaches_the_latents() -> None:
    """The trap: attention to raw patches without positions reads a set."""
    torch.manual_seed(0)
    bridge = PerceiverResampler(4, 16, queries=3, layers=1, heads=2)
    values = torch.randn(6, 4)
    wide, tall, swapped = (
        bridge(Tokens.stack([Tokens.of_grid(x, grid)])).values
        for x, grid in ((values, (1, 2, 3)), (values, (1, 3, 2)), (values.flip(0), (1, 2, 3)))
    )
    assert not torch.allclose(wide, tall, atol=1e-3) and not torch.allclose(wide, swapped, atol=1e-3)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"heads \(5\) must divide the decoder's width, out_dim \(16\)"):
        PerceiverResampler(4, 16, heads=5)
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        PerceiverResampler(4, 16, queries=0)
