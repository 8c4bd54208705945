"""The model, top to bottom as a sample goes: media tokens -> encoder -> bridge -> splice -> decoder -> logits.

Shape legend: `B` rows, `T` positions, `D` width, `V` vocabulary, `M` media items, `N` tokens of an item.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.datasets.chat_template import ChatTemplate
from mm.decoder.cache import Cache
from mm.decoder.decoder import Decoder
from mm.decoder.embedding import LearnedPositions, Projection
from mm.encoders.identity import identity
from mm.fusion.splice import Features, splice
from mm.tokenizers.text import TextTokenizer
from mm.types import (
    IGNORE,
    KINDS,
    SLOT_IDS,
    Batch,
    BridgeFactory,
    EncoderFactory,
    MediaSpec,
    MediaTokenizer,
    Routing,
    Sequence,
    Tokens,
)


@dataclass
class TowerConfig:
    """One kind of media: how it is tokenized, encoded and bridged. `encoder_of` shares another kind's encoder."""

    tokenizer: MediaTokenizer
    bridge: BridgeFactory
    encoder: EncoderFactory | None = None
    encoder_of: str | None = None


class EmbeddingHead(nn.Module):
    """One vector per text and per media item, in a shared space of `dim`: (n, D) means -> (n, dim), unit length.

    Used by contrastive alignment and for retrieval. `log_scale` and `shift` are the similarity's learned temperature
    (CLIP, arXiv 2103.00020) and offset (SigLIP, arXiv 2303.15343).
    """

    def __init__(self, width: int, dim: int = 128, initial_scale: float = 10.0, initial_shift: float = -10.0) -> None:
        super().__init__()
        self.text = nn.Linear(width, dim, bias=False)
        self.media = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(initial_scale).log())
        self.shift = nn.Parameter(torch.tensor(initial_shift))

    def embed_media(self, features: Features) -> Tensor:
        """(M, dim): the projected mean of each item's unpadded features."""
        weight = features.tokens.mask[..., None].to(features.tokens.values.dtype)
        mean = (features.tokens.values * weight).sum(1) / weight.sum(1).clamp(min=1)
        return F.normalize(self.media(mean).float(), dim=-1)

    def embed_text(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden (B, T, D), mask (B, T) bool -> (B, dim): the projected mean of each row's unpadded states."""
        weight = mask[..., None].to(hidden.dtype)
        return F.normalize(self.text((hidden * weight).sum(1) / weight.sum(1).clamp(min=1)).float(), dim=-1)


class Tower(nn.Module):
    """Tokens of one kind (M, N, F) -> Features (M, N', D)."""

    def __init__(self, kind: str, config: TowerConfig, width: int, encoders: dict[str, nn.Module]) -> None:
        super().__init__()
        self.tokenizer = config.tokenizer
        if (config.encoder is None) == (config.encoder_of is None):
            raise ValueError(f"towers.{kind}: give either encoder or encoder_of")
        if config.encoder_of is not None and config.encoder_of not in encoders:
            raise ValueError(
                f"towers.{kind}.encoder_of names {config.encoder_of!r}; a tower above it must have that name"
            )
        self.owns_encoder = config.encoder is not None
        encoder: Any = config.encoder(self.tokenizer.dim) if config.encoder else encoders[str(config.encoder_of)]
        self.encoder = encoder
        self.bridge: Any = config.bridge(encoder.out_dim, width)

    def spec(self) -> MediaSpec:
        return MediaSpec(self.tokenizer, (self.encoder.reduction, self.bridge.reduction), self.bridge.inline)

    @property
    def encoder_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> Tower:
        """An encoder that learns nothing stays in evaluation mode: its dropout is off, its batch norms' statistics are
        as frozen as its weights, and it makes the features that `mm shard --features` stores."""
        super().train(mode)
        if not self.encoder_learns:
            self.encoder.eval()
        return self

    def forward(self, tokens: Tokens, encoded: bool = False) -> Features:
        """`encoded`: the tokens are what the encoder made of a medium, read from a shard."""
        tokens = self.as_encoded(tokens) if encoded else self.encode(tokens)
        return Features(self.bridge(tokens), self.bridge.inline)

    def encode(self, tokens: Tokens) -> Tokens:
        """The encoder's features; no graph is kept of one that learns nothing, unless its input asks for gradients."""
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (self.encoder_learns or tokens.values.requires_grad),
        ):
            return self.encoder(tokens)

    def as_encoded(self, tokens: Tokens) -> Tokens:
        """Stored features in the dtype that the encoder would have given."""
        return tokens.with_values(tokens.values.to(next(self.bridge.parameters()).dtype))

    def without_items(self, device: torch.device) -> Features:
        """Of a batch without this kind: down the same path, so that what learns gets zero gradients and not none."""
        learns = self.encoder_learns
        tokens = Tokens(
            torch.zeros(0, 1, self.tokenizer.dim if learns else self.encoder.out_dim, device=device),
            torch.zeros(0, 1, 3, dtype=torch.long, device=device),
            torch.zeros(0, 1, dtype=torch.bool, device=device),
            torch.ones(0, 3, dtype=torch.long, device=device),
        )
        return self(tokens, encoded=not learns)


@dataclass
class ModelOutput:
    """hidden (B, T, D) after the final norm; one Routing or None per layer; the Sequence that was read.

    `head` gives the logits (..., V) float32 of hidden states (..., D). `logits` (B, T, V) float32 are computed when
    first asked for: training asks only for supervised positions.
    """

    hidden: Tensor
    routings: list[Routing | None]
    sequence: Sequence
    head: Projection

    @cached_property
    def logits(self) -> Tensor:
        return self.head(self.hidden)


# A step takes milliseconds: neither the model's structure nor sizes that cannot have changed are checked in each.
_COMPILE: dict[str, Any] = {
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    "size_asserts": False,
}
# On a CPU the program calls its kernels from C++. On a GPU a graph does (mm.generation.caches.graph), and kernels are
# tuned, without which Inductor leaves the product of one row to cuBLAS.
_COMPILE_FOR: dict[str, dict[str, Any]] = {"cpu": {"cpp_wrapper": True}, "cuda": {"coordinate_descent_tuning": True}}


class MultimodalModel(nn.Module):
    """Text tokenizer, one tower per kind of media, and one decoder.

    `tokenizer` is a path that TextTokenizer.load takes, or a tokenizer; `towers` maps image, audio, video to their
    parts. The decoder's width and the tokenizers' widths are read from the parts: no width is configured twice.
    """

    def __init__(
        self,
        tokenizer: str | TextTokenizer,
        decoder: Decoder,
        towers: dict[str, TowerConfig] | None = None,
        template: ChatTemplate = ChatTemplate(),
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = TextTokenizer.load(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.template = template
        self.decoder = decoder
        if not hasattr(decoder, "embed"):
            decoder.set_vocabulary(self.tokenizer.vocab_size)
        elif decoder.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"decoder.vocab_size {decoder.vocab_size} is below the tokenizer's {self.tokenizer.vocab_size}"
            )
        self.slots = nn.Embedding(len(KINDS), decoder.width)
        nn.init.normal_(self.slots.weight, std=0.02)
        self.towers = nn.ModuleDict()
        encoders: dict[str, nn.Module] = {}
        for kind, config in (towers or {}).items():
            if kind not in KINDS:
                raise ValueError(f"towers has {kind!r}; the kinds are {', '.join(KINDS)}")
            tower = Tower(kind, config, decoder.width, encoders)
            self.towers[kind], encoders[kind] = tower, tower.encoder
        if any(not spec.inline for spec in self.media_specs().values()):
            decoder.add_cross_attention()
        self.config: dict[str, Any] | None = None  # the class_path/init_args tree that made this model, for checkpoints
        self.origin: dict[str, Any] | None = None  # what a published checkpoint said beside its weights (mm.pretrained)
        self._compiled_step: Callable[[Tensor, Cache], Tensor] | None = None
        self.embedding_head = EmbeddingHead(decoder.width, embedding_dim) if embedding_dim else None

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.weight.device

    def tower(self, kind: str) -> Tower:
        tower = self.towers[kind]
        assert isinstance(tower, Tower)
        return tower

    def media_specs(self) -> dict[str, MediaSpec]:
        """What the data side needs to make and count each kind of media."""
        return {kind: self.tower(kind).spec() for kind in self.towers}

    def encode_media(self, batch: Batch) -> dict[str, Features]:
        """Every tower's features; towers without an item run on none, so that all ranks take the same path."""
        for kind, media in batch.media.items():
            if kind not in self.towers:
                read = ", ".join(self.towers) or "text only"
                raise ValueError(f"{media.names[0]}: this model reads {read}, not {kind}")
        features = {}
        for kind in self.towers:
            tower, media = self.tower(kind), batch.media.get(kind)
            features[kind] = tower.without_items(self.device) if media is None else tower(media.tokens, media.encoded)
        return features

    def encoder_learns(self, kind: str) -> bool:
        """Whether a stage trains the encoder of this kind, so that features stored of it would soon be stale."""
        return self.tower(kind).encoder_learns

    def encoder_identity(self, kind: str) -> dict[str, Any]:
        """What the features of this kind depend on: the settings of tokenizer and encoder, and the weights."""
        tower = self.tower(kind)
        return identity(tower.tokenizer, tower.encoder)

    def forward(
        self,
        batch: Batch | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        features: dict[str, Features] | None = None,
    ) -> ModelOutput:
        """A Batch, or text alone as input_ids (B, T) int64 with attention_mask (B, T), 0 at padding on either side.

        Text alone keeps its columns: logits (B, T, V) stand where the ids do. In a Batch media expand, rows move left.
        `features` are the batch's encoded media where the caller has them already.
        """
        if batch is None:
            if input_ids is None:
                raise ValueError("MultimodalModel.forward needs a batch or input_ids")
            batch = text_batch(input_ids, attention_mask)
        features = self.encode_media(batch) if features is None else features
        sequence = splice(batch, self.decoder.embed, features, self.slots)
        sequence.embeddings = sequence.embeddings + self._zero()
        hidden, routings = self.decoder(sequence, cache)
        if cache is not None:
            self._note_next(sequence, cache)
        return ModelOutput(hidden, routings, sequence, self.decoder.projection)

    def _zero(self) -> Tensor:
        """0, through the parameters that this batch or objective may not use.

        Their gradients are then zero, not missing: distributed training waits for the gradient of every parameter.
        """
        idle = [self.slots.weight, *(self.embedding_head.parameters() if self.embedding_head is not None else ())]
        return torch.stack([parameter.reshape(-1)[:0].sum() for parameter in idle]).sum()

    def new_cache(self) -> Cache:
        return self.decoder.new_cache()

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One more token per row, ids (B,), after a forward pass with this cache -> logits (B, V) float32."""
        if isinstance(self.decoder.embed_positions, LearnedPositions):
            assert cache.next_index is not None
            self.decoder.embed_positions.check(cache.next_index)
        return cache.step(self._step, ids)

    def _step(self, ids: Tensor, cache: Cache) -> Tensor:
        return self.logits(self.advance(ids[:, None], cache)[:, 0])

    @property
    def compiled_step(self) -> Callable[[Tensor, Cache], Tensor]:
        """`step` as one program of torch.compile, which is made when it is first run: seconds, or a minute."""
        if self._compiled_step is None:
            # Under a name of its own: torch.compile keeps its programs by the code, and must not mix up two models.
            code = type(self)._step.__code__.replace(co_name=f"_step_of_{id(self):x}")
            own = types.FunctionType(code, globals(), code.co_name)
            options = _COMPILE | _COMPILE_FOR.get(self.device.type, {})
            self._compiled_step = torch.compile(types.MethodType(own, self), fullgraph=True, options=options)
        return self._compiled_step

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultimodalModel:
        self._compiled_step = None  # a program is for one device and dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: a compiled program is this model's own."""
        return self.__dict__ | {"_compiled_step": None}

    def advance(self, ids: Tensor, cache: Cache, lengths: Tensor | None = None) -> Tensor:
        """More text in every row, ids (B, T), after a forward pass with this cache -> hidden states (B, T, D).

        Row i has `lengths[i]` tokens (None: T), and padding after them.
        """
        assert cache.next_index is not None and cache.next_position is not None
        sequence = self.text_after(ids, cache.next_index, cache.next_position, lengths)
        sequence.cross = cache.cross
        hidden, _ = self.decoder(sequence, cache)
        read = ids.shape[1] if lengths is None else lengths
        cache.next_index, cache.next_position = cache.next_index + read, cache.next_position + read
        return hidden

    def text_after(self, ids: Tensor, index: Tensor, position: Tensor, lengths: Tensor | None = None) -> Sequence:
        """Text ids (B, T), one document a row, that goes on at index (B,) and position (B,). `lengths`: see advance."""
        steps = torch.arange(ids.shape[1], device=ids.device)
        return Sequence(
            embeddings=self.decoder.embed(ids),
            index=index[:, None] + steps,
            positions=(position[:, None] + steps)[..., None].expand(-1, -1, 3),
            document_ids=torch.ones_like(ids) if lengths is None else (steps < lengths[:, None]).long(),
            branch_ids=torch.zeros_like(ids),
            modality_ids=torch.zeros_like(ids),
            labels=torch.full_like(ids, IGNORE),
            predecessor=torch.full_like(ids, -1),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) float32."""
        return self.decoder.logits(hidden)

    def _note_next(self, sequence: Sequence, cache: Cache) -> None:
        """Where generation goes on: after the last real position of each row (one document, no branches)."""
        if bool((sequence.document_ids > 1).any()) or bool(sequence.branch_ids.any()):
            raise ValueError("a batch to be continued must hold one sample a row, without branches")
        # Padding counts its own places, and may count further than a short row.
        cache.next_index = sequence.index.masked_fill(~sequence.mask, -1).amax(1) + 1
        cache.next_position = sequence.positions.masked_fill(~sequence.mask[..., None], -1).amax((1, 2)) + 1
        cache.cross = sequence.cross

    @overload
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor: ...
    @overload
    def generate(self, *, messages: list[dict[str, Any]], **options: Any) -> str: ...
    def generate(self, input_ids: Any = None, attention_mask: Any = None, messages: Any = None, **options: Any) -> Any:
        """Text ids (B, T) -> the new ids alone (B, <= max_new_tokens); or one chat -> the text of its answer.

        `messages` are [{"role", "content"}, ...] with media in their parts (mm.datasets.messages). `options` are
        max_new_tokens, seed, max_length and those of mm.generation.options.Decoding: temperature, num_beams, cache, ...
        Errors: mm.generation.generate, which also gives answers with all that is known of them.
        """
        from mm.generation.answer import generate_either  # upward: a model can speak without its caller knowing how

        return generate_either(self, input_ids, attention_mask, messages, **options)


def text_batch(input_ids: Tensor, attention_mask: Tensor | None = None) -> Batch:
    """One text document a row. attention_mask (B, T), 0 at padding."""
    if bool((input_ids < 0).any()):
        bad = int(input_ids.min())
        slots = {v: k for k, v in SLOT_IDS.items()}
        raise ValueError(
            f"input_ids holds {bad}"
            + (f" (the slot of {slots[bad]})" if bad in slots else "")
            + "; text ids start at 0"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    ignored = torch.full_like(input_ids, IGNORE)
    return Batch(input_ids, ignored, mask, torch.zeros_like(input_ids))
