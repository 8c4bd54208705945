"""Media beside the sequence: keys and values for the decoder's gated cross-attention layers."""

from __future__ import annotations

from torch import nn

from mm.fusion.resampler import PerceiverResampler
from mm.types import Bridge, Tokens


class GatedCrossAttentionBridge(Bridge):
    """What Flamingo's gated cross-attention layers read (Alayrac et al. 2022, arXiv:2204.14198, section 2.2).

    The media take one position of the sequence (`inline` is False) whatever their size; their features, projected to
    the decoder's width and normalised, are read by the decoder's cross-attention layers, which hold the gates. With
    `queries` a `PerceiverResampler` (with its `layers` and `heads`) first makes that many tokens of each item.

    (M, N, in_dim) -> (M, N or queries, out_dim).
    """

    inline = False

    def __init__(self, in_dim: int, out_dim: int, queries: int | None = None, layers: int = 2, heads: int = 8) -> None:
        super().__init__()
        if queries is None:
            self.project: nn.Module = FeatureProjection(in_dim, out_dim)
        else:
            self.project = PerceiverResampler(in_dim, out_dim, queries=queries, layers=layers, heads=heads)
            self.reduction = self.project.reduction

    def forward(self, tokens: Tokens) -> Tokens:
        return self.project(tokens)


class FeatureProjection(nn.Module):
    """Linear to the decoder's width, then LayerNorm, so that keys of every encoder have one scale."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_values(self.norm(self.linear(tokens.values.to(self.linear.weight.dtype))))
