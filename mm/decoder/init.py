"""How weights start: each part says it for itself, given the scheme that the decoder was configured with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Init:
    """Normal matrices, zero biases; what writes into the residual stream is smaller by sqrt(2 * layers) (GPT-2).

    `std` is that of every matrix; None is 1 / sqrt(its input width). A part with weights of its own has a method
    `initialise(init)`, called after those of the parts inside it; linear layers and embeddings need none.
    """

    std: float | None
    layers: int

    def normal(self, weight: Tensor, into_residual: bool = False) -> None:
        """Fills a (..., out, in) weight. `into_residual`: its product is added to the residual stream."""
        if weight.is_meta:
            return  # nothing to fill, and slow to pretend (`mm info` on hundreds of layers)
        std = self.std if self.std is not None else weight.shape[-1] ** -0.5
        nn.init.normal_(weight, std=std / math.sqrt(2 * self.layers) if into_residual else std)

    def __call__(self, module: nn.Module) -> None:
        """What `Module.apply` calls on every module, from the leaves up."""
        initialise = getattr(module, "initialise", None)
        if initialise is not None:
            initialise(self)
        elif isinstance(module, nn.Linear):
            self.normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
