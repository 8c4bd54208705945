"""The decoder: embeddings, layers chosen by a pattern, a final norm and a head.

Shape legend: `B` rows, `T` positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm.decoder.attention.cross import GatedCrossAttention
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.cache import Cache
from mm.decoder.ffn.dense import GatedFFN, PlainFFN
from mm.decoder.ffn.experts import SwigluExperts
from mm.decoder.ffn.moe import SparseMoE
from mm.decoder.ffn.routers.topk import TopKRouter
from mm.decoder.layout import Layout
from mm.types import Routing, Sequence


@dataclass
class LayerGroup:
    """`repeat` times the layers of `pattern`, each "mixer/ffn" by their names in the decoder's `mixers` and `ffns`."""

    pattern: list[str]
    repeat: int = 1


class Layer(nn.Module):
    """Pre-norm residual layer: [gated cross-attention,] mixer, feed-forward part."""

    def __init__(self, width: int, mixer: nn.Module, ffn: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.cross: GatedCrossAttention | None = None
        self.mixer_norm, self.mixer = nn.RMSNorm(width, eps=norm_eps), mixer
        self.ffn_norm, self.ffn = nn.RMSNorm(width, eps=norm_eps), ffn

    def forward(
        self, x: Tensor, mask: Tensor, layout: Layout, cache: Cache | None, number: int
    ) -> tuple[Tensor, Routing | None]:
        if self.cross is not None:
            x = self.cross(x, layout)
        x = x + self.mixer(self.mixer_norm(x), layout, cache, number)
        if isinstance(self.ffn, SparseMoE):
            y, routing = self.ffn(self.ffn_norm(x), mask)
            return x + y, routing
        return x + self.ffn(self.ffn_norm(x)), None


class Decoder(nn.Module):
    """Sequence -> hidden states (B, T, D) after the final norm, and one Routing (or None) per layer.

    `mixers` and `ffns` name the kinds of parts, each built with the width; `layers` says where they stand:

        mixers: {full: {class_path: mm.decoder.attention.grouped.GroupedAttention, init_args: {heads: 8}}}
        ffns:   {dense: {class_path: ...GatedFFN}, moe: {class_path: ...SparseMoE}}
        layers: [{pattern: [full/dense]}, {pattern: [full/moe], repeat: 11}]

    The vocabulary is the text tokenizer's, given by the model. `cross_every` n puts gated cross-attention into every
    n-th layer, but only if a bridge asks for it (`add_cross_attention`). `checkpoint_activations` recomputes each
    layer in the backward pass instead of keeping its activations. Matrices start normal with `init_std`; None is
    1 / sqrt(their input width), which lets narrow models (under some 500 wide) learn sooner.
    """

    def __init__(
        self,
        width: int,
        mixers: dict[str, Callable[[int], nn.Module]],
        ffns: dict[str, Callable[[int], nn.Module]],
        layers: list[LayerGroup],
        vocab_size: int | None = None,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        cross_every: int = 2,
        cross_heads: int = 8,
        checkpoint_activations: bool = False,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__()
        self.init_std = init_std
        self.width, self.cross_every, self.cross_heads = width, cross_every, cross_heads
        self.checkpoint_activations = checkpoint_activations
        self.tie_embeddings = tie_embeddings
        kinds = [name for group in layers for _ in range(group.repeat) for name in group.pattern]
        self.layers = nn.ModuleList(
            Layer(width, _part("mixers", mixers, mixer)(width), _part("ffns", ffns, ffn)(width), norm_eps)
            for mixer, ffn in map(_split, kinds)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        if vocab_size is not None:
            self.set_vocabulary(vocab_size)

    def set_vocabulary(self, vocab_size: int) -> None:
        """Makes the embedding and the head, and initialises every weight."""
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, self.width)
        self.head = nn.Linear(self.width, vocab_size, bias=False)
        if self.tie_embeddings:
            self.head.weight = self.embed.weight
        self.apply(self._initialise)
        nn.init.normal_(self.head.weight, std=0.02)  # as the embedding, which it may be

    def add_cross_attention(self) -> None:
        """Puts gated cross-attention into every `cross_every`-th layer, counted from the first."""
        for layer in list(self.layers)[:: self.cross_every]:
            assert isinstance(layer, Layer)
            layer.cross = GatedCrossAttention(self.width, self.cross_heads)
            layer.cross.apply(self._initialise)

    def forward(self, sequence: Sequence, cache: Cache | None = None) -> tuple[Tensor, list[Routing | None]]:
        past = cache.places if cache is not None else None
        layout = Layout.of(sequence, past)
        x, mask, routings = sequence.embeddings, sequence.mask, []
        for number, layer in enumerate(self.layers):
            if self.checkpoint_activations and self.training:
                x, routing = checkpoint(layer, x, mask, layout, None, number, use_reentrant=False)  # type: ignore[misc]
            else:
                x, routing = layer(x, mask, layout, cache, number)
            routings.append(routing)
        if cache is not None:
            cache.places = layout.keys
        return self.norm(x), routings

    def new_cache(self) -> Cache:
        return Cache(len(self.layers))

    def _initialise(self, module: nn.Module) -> None:
        """Normal matrices, zero biases; what writes into the residual stream is smaller by sqrt(2 * layers) (GPT-2)."""
        residual = 1 / math.sqrt(2 * len(self.layers))
        if isinstance(module, nn.Linear):
            self._normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, SwigluExperts):
            self._normal(module.gate_up)
            self._normal(module.down, residual)
        elif isinstance(module, TopKRouter):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, GroupedAttention):  # after its parts: `apply` goes from the leaves up
            self._normal(module.out.weight, residual)
        elif isinstance(module, (GatedFFN, PlainFFN)):
            self._normal(module.down.weight, residual)

    def _normal(self, weight: Tensor, factor: float = 1.0) -> None:
        std = self.init_std if self.init_std is not None else weight.shape[-1] ** -0.5
        nn.init.normal_(weight, std=std * factor)


def _split(kind: str) -> tuple[str, str]:
    mixer, slash, ffn = kind.partition("/")
    if not slash:
        raise ValueError(f"Decoder.layers: pattern entry {kind!r} is not of the form mixer/ffn")
    return mixer, ffn


def _part(argument: str, parts: dict[str, Callable[[int], nn.Module]], name: str) -> Callable[[int], nn.Module]:
    if name not in parts:
        raise ValueError(f"Decoder.layers names {name!r}, which is not in {argument} ({', '.join(parts)})")
    return parts[name]
