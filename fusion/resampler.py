"""A resampler: a media item of any size becomes a fixed number of tokens.

`M` media items, `N` tokens of an item, `Q` queries, `D` the decoder's width, `H` heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.fusion.places import fourier
from mm.types import Bridge, Reduction, Tokens


class PerceiverResampler(Bridge):
    """The Perceiver Resampler of Flamingo (Alayrac et al. 2022, arXiv:2204.14198, section 2.1 and appendix A.1.1).

    `queries` learned latents read the media in `layers` rounds of cross-attention and GELU MLP; keys and values are
    the media and the latents together. The media carry Fourier features of their place in the grid, as in Perceiver
    (Jaegle et al. 2021, arXiv:2103.03206, section 3.2): without them a set of raw patches would lose its layout.
    `norm` puts a LayerNorm before all else, as in `MLPProjector`.

    (M, N, in_dim) -> (M, queries, out_dim), grid (queries, 1, 1), nothing padded.
    Raises ValueError if `heads` does not divide `out_dim` or `queries` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        queries: int = 64,
        layers: int = 2,
        heads: int = 8,
        bands: int = 16,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        self.reduction = Reduction(fixed=queries)
        self.bands = bands
        self.norm_in = nn.LayerNorm(in_dim) if norm else nn.Identity()
        self.embed = nn.Linear(in_dim + 6 * bands, out_dim)
        self.latents = nn.Parameter(torch.randn(queries, out_dim) * 0.02)
        self.layers = nn.ModuleList(ResamplerLayer(out_dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, tokens: Tokens) -> Tokens:
        x = self.norm_in(tokens.values.to(self.embed.weight.dtype))
        media = self.embed(torch.cat([x, fourier(tokens, self.bands).to(x.dtype)], dim=-1))
        mask = self.key_mask(tokens.mask)
        latents = self.latents.expand(len(media), -1, -1)
        for layer in self.layers:
            latents = layer(latents, media, mask)
        return self.as_tokens(self.norm(latents))

    def key_mask(self, mask: Tensor) -> Tensor | None:
        """(M, N) -> (M, 1, 1, N + Q), the latents being always visible; None where nothing is padded."""
        return None if bool(mask.all()) else F.pad(mask, (0, len(self.latents)), value=True)[:, None, None]

    def as_tokens(self, values: Tensor) -> Tokens:
        items, queries, _ = values.shape
        index = torch.arange(queries, device=values.device)
        positions = F.pad(index[:, None], (0, 2)).expand(items, -1, -1)
        mask = torch.ones(items, queries, dtype=torch.bool, device=values.device)
        return Tokens(values, positions, mask, index.new_tensor([queries, 1, 1]).expand(items, -1))


class ResamplerLayer(nn.Module):
    """latents (M, Q, D), media (M, N, D) -> latents (M, Q, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads ({heads}) must divide the decoder's width, out_dim ({width})")
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, latents: Tensor, media: Tensor, mask: Tensor | None) -> Tensor:
        head = (self.heads, latents.shape[-1] // self.heads)
        normed = self.norm_latents(latents)
        k, v = self.kv(torch.cat([self.norm_media(media), normed], dim=1)).unflatten(-1, (2, *head)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (self.q(normed).unflatten(-1, head), k, v))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        latents = latents + self.out(read)
        return latents + self.mlp(latents)
