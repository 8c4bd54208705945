"""What a model costs, counted from its modules: parameters, FLOPs and cache. They may be on the meta device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from mm.decoder.embedding import LearnedPositions
from mm.info.memory import Memory, Precision, training_memory

HOW_COUNTED = {
    "parameters": "every weight once; a tied or shared one belongs to the first part that lists it. Modules for "
    "multi-token prediction stand beside the model: their weights are in parameters_mtp only",
    "active": "parameters less the experts a token does not choose: E - K of the E routed experts of each layer. "
    "Publishers differ in one thing: some count the embedding table (Mixtral, Qwen3), of which a token reads one row, "
    "others only what a token is multiplied with (DeepSeek-V3, gpt-oss), which is active_without_embedding",
    "embedding": "rows of the lookup tables, tokens and learned positions, which cost memory but no multiplication",
    "forward": "2 FLOPs per active parameter outside the embedding (a tied output head counts as one), "
    "plus attention scores and weighted sums of one query over the whole context (media beside it left out), or the "
    "update and reading of a recurrent layer's state, whose cost does not depend on the context",
    "training": "3 x forward, as the backward pass multiplies twice as often; nothing recomputed. It is the context's "
    "last query, the dearest: those of a causal sequence see half of it on average",
    "towers": "2 FLOPs per parameter for each media token that enters, attention scores left out: an upper bound where "
    "a tower merges tokens. Not in the FLOPs per decoder token. An encoder that two towers share counts in both",
    "cache": "numbers that the layers keep for a token x bytes per number (windowed layers keep every token too), "
    "plus what recurrent layers keep for a row whatever its length, in float32",
    "memory": "to train every weight on one device with AdamW, nothing sharded: weights (bf16-mixed keeps a bfloat16 "
    "copy of each from forward to backward), gradients, two moments. Activations are an estimate of the decoder's: "
    "inputs and outputs of every matrix product, float32 inputs of norms, what recurrent scans keep; scores not (no "
    "attention kernel keeps them); where activations are recomputed, one layer's and every layer's input. Logits as if "
    "every token were supervised, in float32, with their gradient. Towers' activations left out",
}

KEYS = {
    "model": "class of the model",
    "context": "tokens that a query looks back on, and the length of a training row",
    "layers": "layers of the decoder",
    "parameters": "weights, in all",
    "active": "weights that one token uses",
    "active_without_embedding": "weights that one token is multiplied with: active without the lookup tables, but with "
    "a tied output head",
    "embedding": "weights of lookup tables",
    "parameters_mtp": "weights of multi-token-prediction modules, in no other number but the memory to train",
    "flops_forward": "FLOPs of the decoder for one token",
    "flops_attention": "of these, FLOPs that depend on the mixers' kind and no weight: scores and sums, or scans",
    "flops_training": "FLOPs of the decoder to train on one token",
    "cache_bytes_per_number": "size of one cached number",
    "cache_numbers_per_layer": "numbers that each layer keeps for one token, first layer first",
    "cache_bytes_per_token": "cache of one token, all layers",
    "cache_bytes_fixed": "cache of one row whatever its length, all layers",
    "cache_bytes_at_context": "cache of one row of `context` tokens",
    "memory": "bytes to train: weights, gradients, optimizer, activations, logits and their total, for rows of "
    "`context` tokens (tokens in all) in `precision`; recomputed: whether layers' activations are",
    "parts": "each part's parameters, active, embedding and FLOPs for one of its tokens",
    "counted": "how, in words",
}


@dataclass(frozen=True)
class Part:
    """One row of the table. `flops` is the forward pass of one token of this part (a media token for a tower)."""

    name: str
    parameters: int
    active: int
    embedding: int
    flops: int


@dataclass(frozen=True)
class Info:
    """What a model costs, as `KEYS` and `HOW_COUNTED` explain. FLOPs are per decoder token, sizes in bytes."""

    model: str
    context: int
    layers: int
    parameters: int
    active: int
    active_without_embedding: int
    embedding: int
    parameters_mtp: int
    flops_forward: int
    flops_attention: int
    flops_training: int
    cache_bytes_per_number: int
    cache_numbers_per_layer: list[int]
    cache_bytes_per_token: int
    cache_bytes_fixed: int
    cache_bytes_at_context: int
    memory: Memory
    parts: list[Part]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "counted": HOW_COUNTED}, indent=2)


assert KEYS.keys() == {field.name for field in fields(Info)} | {"counted"}


class _Counter:
    """Counts one part after another. A weight's memory belongs to the first part that has it, its use to all."""

    def __init__(self, model: nn.Module) -> None:
        self.counted: set[nn.Parameter] = set()
        self.idle = _idle_shares(model)
        self.tables = {m.weight for m in model.modules() if isinstance(m, (nn.Embedding, LearnedPositions))}

    def part(self, name: str, modules: Iterable[nn.Module | None]) -> Part:
        """A row whose FLOPs are two per weight used and not looked up."""
        # in order, each once
        weights = {weight: None for module in modules if module is not None for weight in module.parameters()}
        new = [weight for weight in weights if weight not in self.counted]
        self.counted.update(new)
        return Part(
            name,
            parameters=sum(weight.numel() for weight in new),
            active=self._active(new),
            embedding=sum(weight.numel() for weight in new if weight in self.tables),
            flops=2 * self._active(weight for weight in weights if weight not in self.tables),
        )

    def _active(self, weights: Iterable[nn.Parameter]) -> int:
        return round(sum(weight.numel() * (1 - self.idle.get(weight, 0.0)) for weight in weights))


def _idle_shares(model: nn.Module) -> dict[nn.Parameter, float]:
    """Weight -> the share of it that one token does not use: (E - K) / E for routed experts."""
    shares = {}
    for layer in model.modules():
        if hasattr(layer, "experts") and hasattr(layer, "experts_per_token"):
            idle = 1 - layer.experts_per_token / layer.num_experts  # type: ignore[operator]
            shares |= dict.fromkeys(layer.experts.parameters(), idle)  # type: ignore[union-attr]
    return shares


def describe(
    model: nn.Module, context: int = 4096, cache_bytes: int = 2, batch: int = 1, precision: Precision = "bf16-mixed"
) -> Info:
    """Counts a decoder, or a model with a `.decoder` and `.towers` (on any device, meta too).

    `context` is in tokens; `cache_bytes` is the size of one cached number (2: bfloat16); `batch` rows of `context`
    tokens and `precision` (Lightning's names) are those of the memory to train. Raises ValueError if a number is not
    positive.
    """
    for name, value in (("context", context), ("cache bytes", cache_bytes), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be positive, not {value}")
    decoder: Any = getattr(model, "decoder", model)
    mixers: list[Any] = [layer.mixer for layer in decoder.layers]
    attention = sum(mixer.attention_flops(context) for mixer in mixers)
    mtp: nn.Module | None = getattr(decoder, "mtp", None)

    counter = _Counter(model)
    embedding = counter.part("decoder: embedding", [decoder.embed, getattr(decoder, "embed_positions", None)])
    mixing = counter.part("decoder: mixers", mixers)
    feed_forward = counter.part("decoder: feed-forward", [layer.ffn for layer in decoder.layers])
    head = counter.part("decoder: output head", [decoder.head])
    beside = counter.part("multi-token prediction", [mtp])
    other = counter.part("decoder: the rest", [decoder])
    mixing = replace(mixing, flops=mixing.flops + attention)
    # a tied head multiplies with the embedding's weight
    head = replace(head, flops=2 * sum(weight.numel() for weight in decoder.head.parameters()))
    other = replace(other, flops=2 * other.active)  # of the whole decoder, only what the parts above left
    decoder_parts = [embedding, mixing, feed_forward, head, other]
    by_kind: Any = getattr(model, "towers", nn.ModuleDict())
    towers = [counter.part(f"{kind} tower", [tower]) for kind, tower in by_kind.items()]
    rest = replace(counter.part("slots, retrieval head", [model]), flops=0)  # used once an item, not once a token
    parts = [part for part in (*decoder_parts, *towers, rest) if part.parameters or part.flops]

    forward = sum(part.flops for part in decoder_parts)
    parameters, active = sum(part.parameters for part in parts), sum(part.active for part in parts)
    tables = sum(part.embedding for part in parts)
    tied = head.flops // 2 - head.parameters
    per_layer = [mixer.cache_numbers_per_token() for mixer in mixers]
    per_token = cache_bytes * sum(per_layer)
    fixed = 4 * sum(mixer.cache_numbers_fixed() for mixer in mixers if hasattr(mixer, "cache_numbers_fixed"))
    return Info(
        model=type(model).__name__,
        context=context,
        layers=len(mixers),
        parameters=parameters,
        active=active,
        active_without_embedding=active - tables + tied,
        embedding=tables,
        parameters_mtp=beside.parameters,
        flops_forward=forward,
        flops_attention=attention,
        flops_training=3 * forward,
        cache_bytes_per_number=cache_bytes,
        cache_numbers_per_layer=per_layer,
        cache_bytes_per_token=per_token,
        cache_bytes_fixed=fixed,
        cache_bytes_at_context=per_token * context + fixed,
        memory=training_memory(decoder, parameters + beside.parameters, context, batch, precision),
        parts=parts,
    )
