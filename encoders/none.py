"""No encoder: native early fusion, where the patches or frames themselves go to the bridge."""

from __future__ import annotations

from torch import Tensor

from mm.types import Encoder, Tokens


class NoEncoder(Encoder):
    """Pixels and log-mel bins as they are: the bridge is then the only learned part (Fuyu, Bavishi et al. 2023).

    values (M, N, in_dim) uint8 -> float32 `(x / 255 - mean) / std`; floats (log-mel bins, which the tokenizer has
    normalised) pass unchanged. `out_dim = in_dim`; grid, positions and mask stay.
    """

    def __init__(self, in_dim: int, mean: float = 0.5, std: float = 0.5) -> None:
        super().__init__()
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.out_dim = in_dim
        self.mean, self.std = mean, std

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_values(normalise(tokens.values, self.mean, self.std))


def normalise(values: Tensor, mean: float, std: float) -> Tensor:
    """uint8 pixels -> float32 `(x / 255 - mean) / std`, one pass and one buffer; floats unchanged."""
    if values.is_floating_point():
        return values
    return values.float().mul_(1 / (255 * std)).sub_(mean / std)
