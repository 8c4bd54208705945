from __future__ import annotations

import pytest
import torch
from torch import nn

from mm.encoders.transformer import Block, TransformerEncoder, attention_mask, sincos
from mm.types import Tokens, grid_positions


def test_a_block_is_torchs_own_pre_norm_layer() -> None:
    torch.manual_seed(0)
    block = Block(24, heads=3, mlp_ratio=2).eval()
    reference = nn.TransformerEncoderLayer(
        24, 3, 48, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    names = {
        "norm1": block.norm1, "self_attn.in_proj": block.qkv, "self_attn.out_proj": block.out,
        "norm2": block.norm2, "linear1": block.up, "linear2": block.down,
    }  # fmt: skip
    for name, module in names.items():
        module.weight = reference.get_parameter(f"{name}_weight" if "in_proj" in name else f"{name}.weight")
        module.bias = reference.get_parameter(f"{name}_bias" if "in_proj" in name else f"{name}.bias")
    x, mask = torch.randn(2, 7, 24), torch.arange(7) < torch.tensor([[7], [4]])
    for given in (None, mask):
        ours = block(x, None if given is None else attention_mask(given))
        theirs = reference(x, src_key_padding_mask=None if given is None else ~given)
        keep = mask if given is not None else torch.ones_like(mask)
        # 1e-5: float32, another order of the same sums (fused against unfused attention)
        torch.testing.assert_close(ours[keep], theirs[keep], atol=1e-5, rtol=1e-5)


def test_no_mask_is_built_where_nothing_is_padded() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert attention_mask(mask) is None
    mask[1, 2] = False
    built = attention_mask(mask)
    assert built is not None and built.shape == (2, 1, 1, 3) and built[:, 0, 0].equal(mask)


def test_positions_tell_every_cell_apart_on_every_axis() -> None:
    table = sincos(grid_positions((3, 4, 5)), 20)
    assert table.shape == (60, 20)
    assert len(torch.unique(table, dim=0)) == 60
    assert (
        torch.equal(table[0, :6].view(2, 3)[1], torch.ones(3)) and table[:, 18:].eq(0).all()
    )  # cos 0; what is left over
    t, h, w = sincos(torch.eye(3, dtype=torch.int64) * 2, 18).sub(sincos(torch.zeros(3, 3), 18)).view(3, 3, 6)
    assert t[0].any() and not t[1:].any() and h[1].any() and not h[::2].any() and w[2].any() and not w[:2].any()


def test_the_layout_reaches_the_features() -> None:
    """The trap: without positions a permutation of the patches would be only a permutation of the features."""
    torch.manual_seed(0)
    encoder = TransformerEncoder(12, width=16, layers=1, heads=2)
    values = torch.randint(0, 256, (6, 12), dtype=torch.uint8)
    wide = encoder(Tokens.stack([Tokens.of_grid(values, (1, 2, 3))])).values
    tall = encoder(Tokens.stack([Tokens.of_grid(values, (1, 3, 2))])).values
    assert not torch.allclose(wide, tall, atol=1e-3)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"heads \(5\) must divide width \(16\)"):
        TransformerEncoder(12, width=16, heads=5)
