from __future__ import annotations

import torch

from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.types import MediaSpec, Tokens


def tokens() -> Tokens:
    return Tokens.stack([Tokens.of_grid(torch.randn(6, 4), (1, 2, 3)), Tokens.of_grid(torch.randn(2, 4), (1, 1, 2))])


def test_features_stand_beside_the_sequence_with_one_scale() -> None:
    bridge = GatedCrossAttentionBridge(4, 16)
    out = bridge(tokens())
    assert out.values.shape == (2, 6, 16) and out.grid.tolist() == [[1, 2, 3], [1, 1, 2]]
    # 1e-2: LayerNorm's eps of 1e-5 against variances of order 0.1
    torch.testing.assert_close(out.values.std(-1, correction=0), torch.ones(2, 6), atol=1e-2, rtol=0)


def test_queries_resample() -> None:
    bridge = GatedCrossAttentionBridge(4, 16, queries=5, heads=4)
    out = bridge(tokens())
    assert out.values.shape == (2, 5, 16) and bool(out.mask.all()) and out.grid.tolist() == [[5, 1, 1]] * 2


def test_a_slot_takes_one_position_whatever_its_size() -> None:
    for queries in (None, 64):
        bridge = GatedCrossAttentionBridge(4, 16, queries=queries)
        spec = MediaSpec(tokenizer=None, reductions=(bridge.reduction,), inline=bridge.inline)  # type: ignore[arg-type]
        assert spec.slot_length((60, 16, 16)) == 1
