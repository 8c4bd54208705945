"""A transformer encoder that is trained here, on image patches, video patches or audio frames of any grid.

`M` media items, `N` tokens of an item, `W` width, `H` heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.encoders.none import normalise
from mm.types import Encoder, Tokens


class TransformerEncoder(Encoder):
    """A vision transformer over unfolded patches (Dosovitskiy et al. 2021, arXiv:2010.11929) at native aspect ratio.

    Linear patch embedding (no convolution), additive sin-cos positions on three axes (2-D in MAE, arXiv:2111.06377),
    pre-norm bidirectional blocks, final LayerNorm; no class token. An item attends to all of itself and to nothing
    else: padding is masked, and where nothing is padded no mask is built.

    tokens.values (M, N, in_dim) uint8 or float -> (M, N, width) in the weights' dtype; grid, positions, mask stay.
    Raises ValueError if `heads` does not divide `width`.
    """

    def __init__(
        self,
        in_dim: int,
        width: int = 384,
        layers: int = 6,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        super().__init__()
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.out_dim = width
        self.mean, self.std = mean, std
        self.embed = nn.Linear(in_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)

    def forward(self, tokens: Tokens) -> Tokens:
        x = normalise(tokens.values, self.mean, self.std).to(self.embed.weight.dtype)
        x = self.embed(x)
        x = x + sincos(tokens.positions, x.shape[-1]).to(x.dtype)
        mask = attention_mask(tokens.mask)
        for block in self.blocks:
            x = block(x, mask)
        return tokens.with_values(self.norm(x))


class Block(nn.Module):
    """Pre-norm self-attention and GELU MLP, as in ViT: (M, N, W) -> (M, N, W)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads ({heads}) must divide width ({width})")
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, int(width * mlp_ratio))
        self.down = nn.Linear(int(width * mlp_ratio), width)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attend(self.norm1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, x.shape[-1] // self.heads)).unbind(2)  # (M, N, H, W/H) each
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def attention_mask(mask: Tensor) -> Tensor | None:
    """(M, N) bool -> (M, 1, 1, N) for scaled_dot_product_attention (True = attend); None where nothing is padded."""
    return None if bool(mask.all()) else mask[:, None, None]


def sincos(positions: Tensor, width: int) -> Tensor:
    """Additive positions: cells (..., A) int64 -> (..., width) float32.

    The width is shared equally by the `A` axes; within an axis half are sines and half cosines of `cell / 10000^(i/n)`
    (Vaswani et al. 2017, section 3.5, as MAE lays them out). What the sharing leaves over stays zero.
    """
    axes = positions.shape[-1]
    count = width // (2 * axes)
    frequencies = 10000.0 ** (torch.arange(count, device=positions.device) / -count)
    angles = positions.unsqueeze(-1) * frequencies  # (..., A, count)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return F.pad(table, (0, width - table.shape[-1]))
