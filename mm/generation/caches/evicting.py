"""A cache within a budget: what recent queries attended to stays, the rest goes.

After H2O (Zhang et al. 2023, arXiv 2306.14048) and SnapKV (Li et al. 2024, arXiv 2404.14469): the attention that each
kept position received is added up, over the last queries of a pass and over passes, and the least wanted leave.
Shape legend: `B` rows, `T` queries, `S` kept positions, `H` query heads, `G` key/value heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.attention.windows import Window
from mm.decoder.cache import Cache, Shift
from mm.decoder.layout import Layout, Places

OBSERVED = 32  # queries of a pass whose attention counts, its last ones: of a prompt, that is the question
DECAY = 0.98  # of what was counted before, a pass
REACH = 7  # a position is as wanted as the most wanted within that many around it: words are several tokens long


class EvictingCache(Cache):
    """Each attention layer keeps at most `budget` positions a row between passes: the `recent` last ones, and of the
    others those that were attended to most. All heads of a layer keep the same. Positions stay what they were.

    Raises ValueError for a budget that is not above `recent`; and, by `extend`, for latent attention, whose keys exist
    in no head.
    """

    def __init__(self, layers: int, budget: int, recent: int = 32) -> None:
        super().__init__(layers)
        if not 0 < recent < budget:
            raise ValueError(f"EvictingCache: budget {budget} must be above recent {recent}, and both above 0")
        self.budget, self.recent = budget, recent

    def drop_last(self, count: int) -> None:
        """Raises ValueError: what was evicted does not come back."""
        raise ValueError("draft: this cache cannot take tokens back; use cache dynamic, int8 or int4")

    def extend(
        self, layer: int, layout: Layout, window: Window | None = None, shift: Shift | None = None, **new: Tensor
    ) -> tuple[Layout, Window | None, list[Tensor]]:
        if "keys" not in new:
            raise ValueError("the evicting cache goes by attention to keys; latent attention keeps none: use another")
        here = layout.queries
        zeros = torch.zeros_like(here.index, dtype=torch.float32)
        keys, values, index, document, _ = self.append(
            layer, **new, index=here.index, document=here.document_ids, wanted=zeros
        )
        seen = Places(index, document, torch.zeros_like(index))
        return Layout(here, seen, layout.positions, layout.cross), window, [keys, values]

    def attended(self, layer: int, q: Tensor, layout: Layout, window: Window | None, scale: float) -> None:
        kept = self.layers[layer]
        q = q[:, -OBSERVED:].transpose(1, 2)  # (B, H, t, d)
        keys = kept["keys"].transpose(1, 2).repeat_interleave(q.shape[1] // kept["keys"].shape[2], 1)
        mask = layout.mask(window)[:, :, -OBSERVED:]
        weights = ((q @ keys.transpose(2, 3)).float() * scale).masked_fill(~mask, float("-inf")).softmax(-1)
        real = (layout.queries.document_ids[:, -OBSERVED:] > 0)[:, None, :, None]
        kept["wanted"] = DECAY * kept["wanted"] + (weights * real).sum((1, 2))
        if kept["index"].shape[1] > self.budget:
            self._evict(layer)

    def _evict(self, layer: int) -> None:
        """Keeps `budget` columns of every row; padding goes first."""
        kept = self.layers[layer]
        real = kept["document"] > 0
        last = kept["index"].masked_fill(~real, -1).amax(1, keepdim=True)
        wanted = F.max_pool1d(kept["wanted"][:, None], REACH, stride=1, padding=REACH // 2)[:, 0]
        wanted = wanted.masked_fill(kept["index"] > last - self.recent, float("inf")).masked_fill(~real, -1.0)
        columns = wanted.topk(self.budget, dim=1).indices.sort(dim=1).values
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        self.layers[layer] = {name: x[rows, columns] for name, x in kept.items()}
