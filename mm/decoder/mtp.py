"""Multi-token prediction: small modules that predict the tokens after the next one (DeepSeek-V3, section 2.2).

Shape legend: `B` rows, `T` positions, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mm.decoder.cache import Cache
from mm.decoder.decoder import Block, Layer
from mm.decoder.few_rows import Linear
from mm.decoder.layout import Layout
from mm.types import Routing, Sequence


class Depth(nn.Module):
    """One module of equation 21-22: joins the state of the position before with a token, and runs one layer.

    previous and embeddings (B, T, D) -> (B, T, D), from which the head predicts the token after.
    """

    def __init__(self, width: int, mixer: nn.Module, ffn: nn.Module, block: Block) -> None:
        super().__init__()
        self.token_norm, self.state_norm = block.norm(width), block.norm(width)
        self.join = Linear(2 * width, width, bias=False)
        self.layer = Layer(width, mixer, ffn, block)
        self.norm = block.norm(width)

    def forward(
        self, previous: Tensor, embeddings: Tensor, mask: Tensor, layout: Layout, cache: Cache | None, number: int
    ) -> tuple[Tensor, Routing | None]:
        x = self.join(torch.cat([self.token_norm(embeddings), self.state_norm(previous)], -1))
        x, routing = self.layer(x, mask, layout, cache, number)
        return self.norm(x), routing


class MultiTokenPrediction(nn.Module):
    """`depths` modules after the main layers; the k-th predicts, at each token, the one that follows it, from the main
    model's state k tokens earlier and the k tokens since.

    Embedding and head are the main model's. The paper numbers states by the token they started from; here state k of
    position j has read token j, so its document, branch and place are those of j, its layer masks as the main layers
    do, and its target is the main model's target at j. A position with fewer than k tokens before it in its document
    has no state of depth k: it is padding there, and takes part in no attention, loss or routing statistic.
    """

    def __init__(
        self,
        width: int,
        mixer: Callable[[int], nn.Module],
        ffn: Callable[[int], nn.Module],
        depths: int = 1,
        block: Block = Block(),
    ) -> None:
        super().__init__()
        if depths < 1:
            raise ValueError(f"MultiTokenPrediction: depths must be at least 1, not {depths}")
        self.depths = nn.ModuleList(Depth(width, mixer(width), ffn(width), block) for _ in range(depths))

    def forward(
        self, hidden: Tensor, sequence: Sequence, depths: int | None = None
    ) -> list[tuple[Tensor, Routing | None, Tensor]]:
        """(state (B, T, D), routing, mask (B, T)) of the first `depths` depths; mask says where there is a state.

        `hidden` (B, T, D) is what the decoder gave for `sequence`.
        """
        outputs = []
        state, there = hidden, sequence.mask
        before = sequence.predecessor.clamp(min=0)
        for number in range(len(self.depths) if depths is None else depths):
            previous = state.gather(1, before[..., None].expand_as(state))
            there = there & there.gather(1, before) & (sequence.predecessor >= 0)
            state, routing = self.step(number, previous, replace(sequence, document_ids=sequence.document_ids * there))
            outputs.append((state, routing, there))
        return outputs

    def step(
        self, number: int, previous: Tensor, sequence: Sequence, cache: Cache | None = None
    ) -> tuple[Tensor, Routing | None]:
        """One depth, for drafting: `previous` (B, T, D) are the states, one depth less deep, of the positions before
        those of `sequence`, whose embeddings are the tokens'. `cache` is from `new_cache`, one for each depth.
        """
        layout = Layout.of(sequence) if cache is None else cache.begin(sequence)
        depth = self.depths[number]
        assert isinstance(depth, Depth)
        state, routing = depth(previous, sequence.embeddings, sequence.mask, layout, cache, 0)
        if cache is not None:
            cache.end(layout)
        return state, routing

    @staticmethod
    def new_cache() -> Cache:
        """What one depth keeps of the positions that it has seen."""
        return Cache(1)
