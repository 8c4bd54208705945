"""The decoder: embeddings, layers chosen by a pattern, a final norm and a head.

Shape legend: `B` rows, `T` positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mm.decoder import recompute
from mm.decoder.attention.cross import GatedCrossAttention
from mm.decoder.cache import Cache
from mm.decoder.embedding import Embedding, Head, Projection
from mm.decoder.few_rows import Linear
from mm.decoder.ffn.moe import SparseMoE
from mm.decoder.init import EMBEDDING_STD, Init
from mm.decoder.layout import Layout
from mm.decoder.norms import RMSNorm
from mm.decoder.recompute import Recompute
from mm.decoder.reread import Rereader
from mm.types import Routing, Sequence


@dataclass
class LayerGroup:
    """`repeat` times the layers of `pattern`, each "mixer/ffn" by their names in the decoder's `mixers` and `ffns`.

    "mixer/none" is a layer without a feed-forward part (Mamba-2).
    """

    pattern: list[str]
    repeat: int = 1


@dataclass(frozen=True)
class Block:
    """How a layer is put together: its norms (built with the width; the decoder's last norm too) and where they stand.

    pre       x + f(norm(x)), for the mixer and then for the feed-forward part
    post      x + norm(f(x)) (OLMo 2)
    sandwich  x + norm(f(norm(x))) (Gemma 2)
    parallel  x + mixer(h) + ffn(h), h = norm(x) (Cohere; Wang and Komatsuzaki 2021, GPT-J)

    `residual_scale` multiplies what is added to the stream (Granite's residual_multiplier).
    """

    norm: Callable[[int], nn.Module] = RMSNorm
    arrangement: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    residual_scale: float = 1.0


class Layer(nn.Module):
    """Residual layer: [gated cross-attention,] mixer, [feed-forward part], with norms as the block says."""

    def __init__(self, width: int, mixer: nn.Module, ffn: nn.Module | None, block: Block) -> None:
        super().__init__()
        before, after = block.arrangement != "post", block.arrangement in ("post", "sandwich")
        self.parallel, self.residual_scale = block.arrangement == "parallel", block.residual_scale
        if self.parallel and ffn is None:
            raise ValueError("Decoder.block: a parallel layer needs a feed-forward part; its pattern says none")
        self.cross: GatedCrossAttention | None = None
        self.mixer_norm = block.norm(width) if before else nn.Identity()
        self.mixer = mixer
        self.mixer_out_norm = block.norm(width) if after else nn.Identity()
        self.ffn_norm = block.norm(width) if before and ffn is not None and not self.parallel else nn.Identity()
        self.ffn = ffn
        self.ffn_out_norm = block.norm(width) if after and ffn is not None else nn.Identity()

    def forward(
        self, x: Tensor, mask: Tensor, layout: Layout, cache: Cache | None, number: int
    ) -> tuple[Tensor, Routing | None]:
        if self.cross is not None:
            x = self.cross(x, layout)
        h = self.mixer_norm(x)
        mixed = self.mixer_out_norm(self.mixer(h, layout, cache, number))
        if self.parallel:
            fed, routing = self._feed(h, mask)
            return x + self._scaled(mixed + fed), routing
        x = x + self._scaled(mixed)
        if self.ffn is None:
            return x, None
        fed, routing = self._feed(self.ffn_norm(x), mask)
        return x + self._scaled(self.ffn_out_norm(fed)), routing

    def _feed(self, h: Tensor, mask: Tensor) -> tuple[Tensor, Routing | None]:
        assert self.ffn is not None
        return self.ffn(h, mask) if isinstance(self.ffn, SparseMoE) else (self.ffn(h), None)

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.residual_scale == 1.0 else y * self.residual_scale


class Decoder(nn.Module):
    """Sequence -> hidden states (B, T, D) after the final norm, and one Routing (or None) per layer.

    `mixers` and `ffns` name the kinds of parts, each built with the width; `layers` says where they stand:

        mixers: {full: {class_path: mm.decoder.attention.grouped.GroupedAttention, init_args: {heads: 8}}}
        ffns:   {dense: {class_path: ...GatedFFN}, moe: {class_path: ...SparseMoE}}
        layers: [{pattern: [full/dense]}, {pattern: [full/moe], repeat: 11}]

    The vocabulary is the text tokenizer's, given by the model. `block` says how layers are put together, `embedding`
    how the stream starts, `head` how logits come out of it; `tie_embeddings` makes the head's matrix the embedding's.
    `mtp` predicts tokens further ahead from the hidden states: objectives and drafting call it, not the forward pass.
    `cross_every` n puts gated cross-attention into every n-th layer, but only if a bridge asks for it
    (`add_cross_attention`). `checkpoint_activations` says what the backward pass makes again instead of keeping it:
    "full" every layer; "selective" what is cheap, and experts (results of other matrix products and of attention are
    kept); n every n-th layer from the first. Matrices start normal with `init_std`; None is 1 / sqrt(their input
    width), which lets narrow models (under some 500 wide) learn sooner. Raises ValueError for another policy.
    """

    def __init__(
        self,
        width: int,
        mixers: dict[str, Callable[[int], nn.Module]],
        ffns: dict[str, Callable[[int], nn.Module]],
        layers: list[LayerGroup],
        vocab_size: int | None = None,
        tie_embeddings: bool = True,
        block: Block = Block(),
        embedding: Embedding = Embedding(),
        head: Head = Head(),
        mtp: Callable[[int], nn.Module] | None = None,
        cross_every: int = 2,
        cross_heads: int = 8,
        checkpoint_activations: Recompute | bool = "none",
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__()
        self.width, self.cross_every, self.cross_heads = width, cross_every, cross_heads
        self.checkpoint_activations: Recompute = recompute.policy_of(checkpoint_activations)
        self.tie_embeddings, self.embedding_options, self.head_options = tie_embeddings, embedding, head
        kinds = [_split(name) for group in layers for _ in range(group.repeat) for name in group.pattern]
        self.init = Init(init_std, len(kinds))
        self.layers = nn.ModuleList(
            Layer(
                width,
                _part("mixers", mixers, mixer)(width),
                None if ffn == "none" else _part("ffns", ffns, ffn)(width),
                block,
            )
            for mixer, ffn in kinds
        )
        self.embed_positions = embedding.build_positions(width)
        self.embed_norm = embedding.norm(width) if embedding.norm is not None else None
        self.norm = block.norm(width)
        schemes = (getattr(mixer, "positions", None) for mixer in self.modules())
        self.rereader = Rereader({length for scheme in schemes if (length := getattr(scheme, "switches_at", None))})
        self.mtp = mtp(width) if mtp is not None else None
        if vocab_size is not None:
            self.set_vocabulary(vocab_size)

    def set_vocabulary(self, vocab_size: int) -> None:
        """Makes the embedding and the head, and initialises every weight."""
        self.vocab_size = vocab_size
        self.embed = self.embedding_options.build_tokens(vocab_size, self.width)
        self.head = Linear(self.width, vocab_size, bias=self.head_options.bias)
        if self.tie_embeddings:
            self.head.weight = self.embed.weight
        self.apply(self.init)
        nn.init.normal_(self.head.weight, std=EMBEDDING_STD)  # as the embedding, which it may be

    def add_cross_attention(self) -> None:
        """Puts gated cross-attention into every `cross_every`-th layer, counted from the first."""
        for layer in list(self.layers)[:: self.cross_every]:
            assert isinstance(layer, Layer)
            layer.cross = GatedCrossAttention(self.width, self.cross_heads)
            layer.cross.apply(self.init)

    def forward(self, sequence: Sequence, cache: Cache | None = None) -> tuple[Tensor, list[Routing | None]]:
        """With a cache, what it holds is taken to come before the sequence, and it grows by it."""
        if cache is not None and (again := self.rereader(sequence, cache)) is not None:
            whole, columns = again
            hidden, routings = self._read(whole, cache)
            return hidden.gather(1, columns[..., None].expand(-1, -1, self.width)), routings
        return self._read(sequence, cache)

    def _read(self, sequence: Sequence, cache: Cache | None) -> tuple[Tensor, list[Routing | None]]:
        layout = Layout.of(sequence) if cache is None else cache.begin(sequence)
        x, mask, routings = self._start(sequence), sequence.mask, []
        for number, layer in enumerate(self.layers):
            if self.training and recompute.recomputes(self.checkpoint_activations, number):
                x, routing = recompute.run(self.checkpoint_activations, layer, x, mask, layout, None, number)
            else:
                x, routing = layer(x, mask, layout, cache, number)
            routings.append(routing)
        if cache is not None:
            cache.end(layout)
        return self.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) after the final norm -> (..., V) float32."""
        return self.head_options.finish(self.head(hidden))

    @property
    def projection(self) -> Projection:
        return Projection(self.head, self.head_options)

    def new_cache(self) -> Cache:
        return self.rereader.new_cache(len(self.layers))

    def _start(self, sequence: Sequence) -> Tensor:
        """The stream before the first layer: embeddings, positions, norm."""
        x = sequence.embeddings
        if self.embed_positions is not None:
            x = x + self.embed_positions(sequence.index).to(x.dtype)
        return x if self.embed_norm is None else self.embed_norm(x)


def _split(kind: str) -> tuple[str, str]:
    mixer, slash, ffn = kind.partition("/")
    if not slash:
        raise ValueError(f"Decoder.layers: pattern entry {kind!r} is not of the form mixer/ffn")
    return mixer, ffn


def _part(argument: str, parts: dict[str, Callable[[int], nn.Module]], name: str) -> Callable[[int], nn.Module]:
    if name not in parts:
        raise ValueError(f"Decoder.layers names {name!r}, which is not in {argument} ({', '.join(parts)})")
    return parts[name]
