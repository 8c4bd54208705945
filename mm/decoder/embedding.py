"""Into the stream and out of it: the token embedding and what is done to it, positions that are added, the logits.

Shape legend: `B` rows, `T` positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mm.decoder.init import EMBEDDING_STD, Init


@dataclass(frozen=True)
class Embedding:
    """How the stream starts: token embedding * `scale` [+ positions], then `norm`.

    `scale` multiplies text tokens alone, not media features (Gemma: sqrt(width), Granite: embedding_multiplier).
    `positions` are added to text and media alike, by place in the document: "learned" (GPT-2), a table of `length` rows
    after `offset` unused ones (OPT has 2), or "sinusoidal" (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).
    `norm` is built with the width and applied to the sum (BLOOM).
    """

    scale: float = 1.0
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    length: int | None = None
    offset: int = 0
    norm: Callable[[int], nn.Module] | None = None

    def __post_init__(self) -> None:
        if (self.length is None) == (self.positions == "learned"):
            raise ValueError(
                f"Embedding.length is needed by learned positions, and by them only; positions: {self.positions}, "
                f"length: {self.length}"
            )
        if self.offset and self.positions != "learned":
            raise ValueError(f"Embedding.offset {self.offset} is for learned positions; positions: {self.positions}")

    def build_tokens(self, vocab_size: int, width: int) -> TokenEmbedding:
        return TokenEmbedding(vocab_size, width, self.scale)

    def build_positions(self, width: int) -> LearnedPositions | SinusoidalPositions | None:
        if self.positions == "learned":
            assert self.length is not None
            return LearnedPositions(self.length, width, self.offset)
        return SinusoidalPositions(width) if self.positions == "sinusoidal" else None


@dataclass(frozen=True)
class Head:
    """How logits come from hidden states: softcap(scale * (W h + b)).

    `scale` is Cohere's logit_scale, or 1 / Granite's logits_scaling; `softcap` c is c * tanh(logits / c) (Gemma 2).
    """

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False

    def finish(self, logits: Tensor) -> Tensor:
        """What comes after the matrix, in float32."""
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


@dataclass(frozen=True)
class Projection:
    """hidden states (..., D) -> logits (..., V) float32; a loss over a large vocabulary needs its parts."""

    matrix: nn.Linear
    options: Head

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.options.finish(self.matrix(hidden))


class TokenEmbedding(nn.Embedding):
    """ids (...) int64 -> (..., D), times `scale` (rounded to the weights' dtype first, as Gemma was trained)."""

    def __init__(self, vocab_size: int, width: int, scale: float = 1.0) -> None:
        super().__init__(vocab_size, width)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = super().forward(ids)
        return x if self.scale == 1.0 else x * torch.full((), self.scale, dtype=x.dtype, device=x.device)


class LearnedPositions(nn.Module):
    """Places (B, T) int64 in the document -> (B, T, D): row `offset` + place of a table. Raises ValueError past it."""

    def __init__(self, length: int, width: int, offset: int = 0) -> None:
        super().__init__()
        self.length, self.offset = length, offset
        self.weight = nn.Parameter(torch.empty(length + offset, width))

    def initialise(self, init: Init) -> None:
        nn.init.normal_(self.weight, std=EMBEDDING_STD)

    def check(self, index: Tensor) -> None:
        """Raises ValueError for places past the table."""
        if index.numel() and int(index.max()) >= self.length:
            raise ValueError(
                f"a document of {int(index.max()) + 1} positions is longer than the {self.length} that this decoder "
                "has learned (embedding.length)"
            )

    def forward(self, index: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # a compiled step's caller has checked: the program cannot say so
            self.check(index)
        return self.weight[index + self.offset]


class SinusoidalPositions(nn.Module):
    """Places (B, T) int64 in the document -> (B, T, D) float32: sin and cos of place / 10000^(2i/D), alternating."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"sinusoidal positions need an even width, not {width}")
        self.width = width

    def forward(self, index: Tensor) -> Tensor:
        rate = 10_000.0 ** (-torch.arange(0, self.width, 2, device=index.device).float() / self.width)
        angle = index[..., None].float() * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
