"""Memory to train a decoder: weights, gradients and moments to the byte, activations by a rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mm.decoder.norms import LayerNorm, RMSNorm
from mm.decoder.recompute import Recompute, recomputes

Precision = Literal["bf16-mixed", "bf16-true", "32-true"]


@dataclass(frozen=True)
class _Bytes:
    """Of one number. `copy` is what autocast keeps of a weight beside it."""

    weight: int
    copy: int
    gradient: int
    moments: int
    activation: int


BYTES: dict[Precision, _Bytes] = {
    "bf16-mixed": _Bytes(4, 2, 4, 8, 2),
    "bf16-true": _Bytes(2, 0, 2, 4, 2),
    "32-true": _Bytes(4, 0, 4, 8, 4),
}


@dataclass(frozen=True)
class Memory:
    """Bytes, for `tokens` tokens a step. `recomputed`: layers' activations are made again in the backward pass."""

    precision: Precision
    tokens: int
    recomputed: bool
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    total: int


def training_memory(decoder: Any, parameters: int, context: int, batch: int, precision: Precision) -> Memory:
    """For a model of `parameters` weights in all, trained with AdamW on `batch` rows of `context` tokens.

    Raises ValueError for a precision that is not one of BYTES.
    """
    if precision not in BYTES:
        raise ValueError(f"precision must be {', '.join(BYTES)}, not {precision!r}")
    size, tokens = BYTES[precision], batch * context
    policy: Recompute = getattr(decoder, "checkpoint_activations", "none")
    recomputed, layers = policy != "none", [kept_by(layer, size.activation) for layer in decoder.layers]
    if recomputed:
        again = [recomputes(policy, number) for number in range(len(layers))]
        ends = [decoder.embed.weight.shape[1] * size.activation for _ in layers]
        if policy == "selective":
            ends = [end + _results(layer, size.activation) for end, layer in zip(ends, decoder.layers, strict=True)]
        most = max((kept for kept, made in zip(layers, again, strict=True) if made), default=0)
        each = zip(layers, ends, again, strict=True)
        layers = [most, *(min(end, kept) if made else kept for kept, end, made in each)]
    vocabulary = decoder.embed.weight.shape[0]
    parts = {
        "weights": parameters * (size.weight + size.copy),
        "gradients": parameters * size.gradient,
        "optimizer": parameters * size.moments,
        "activations": tokens * sum(layers),
        "logits": tokens * vocabulary * (size.activation % 4 + 4 + 4),  # as the head gives them, float32, its gradient
    }
    return Memory(precision, tokens, recomputed, **parts, total=sum(parts.values()))


def kept_by(layer: nn.Module, size: int) -> int:
    """Bytes that a layer keeps of one token for its backward pass, activations being of `size` bytes.

    Inputs and outputs of its matrix products (of the experts, those that the token chose); the float32 inputs of its
    norms; and what a part says itself that it keeps beyond: `kept_numbers()`, in the activations' dtype and in float32.
    """
    products, float32 = sum(_expert_products(layer)), 0
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            products += module.in_features + module.out_features
        elif isinstance(module, (RMSNorm, LayerNorm)):
            float32 += module.weight.numel()
        kept: Any = getattr(module, "kept_numbers", None)
        if kept is not None:
            beyond, beyond_float32 = kept()
            products, float32 = products + beyond, float32 + beyond_float32
    return size * products + 4 * float32


def _results(layer: nn.Module, size: int) -> int:
    """Bytes that a layer of "selective" keeps of one token: outputs of products (not of experts), and of attention."""
    numbers = sum(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))
    for module in layer.modules():
        kept: Any = getattr(module, "kept_numbers", None)
        numbers += kept()[0] if kept is not None else 0
    return size * numbers


def _expert_products(layer: nn.Module) -> Iterator[int]:
    """Of every expert matrix (E, out, in): in + out, times the experts that a token chooses."""
    moe: Any
    for moe in layer.modules():
        if hasattr(moe, "experts") and hasattr(moe, "experts_per_token"):
            for weight in moe.experts.parameters():
                if weight.ndim == 3:
                    yield moe.experts_per_token * (weight.shape[1] + weight.shape[2])
