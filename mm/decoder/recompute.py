"""Activation checkpointing: which layers make their activations again in the backward pass, and what those keep.

Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv:1604.06174); what to keep by cost: Korthikanti
et al. 2022 (arXiv:2205.05198), by torch's selective checkpointing.
Experts' products one by one write into buffers that they share, which it cannot keep: "selective" makes those again,
and keeps grouped ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "full", "selective"] | int

_aten = torch.ops.aten
KEPT = frozenset({
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default, _aten._scaled_dot_product_attention_math.default,
    torch.ops.higher_order.flex_attention,
})  # fmt: skip


def policy_of(value: Recompute | bool) -> Recompute:
    """What a config says; true and false, as older ones have it, are full and none. Raises ValueError for all else."""
    if isinstance(value, bool):
        return "full" if value else "none"
    if value in ("none", "full", "selective") or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError(
        f"Decoder.checkpoint_activations must be none, full, selective or a number of layers from 1, got {value!r}"
    )


def recomputes(recompute: Recompute, number: int) -> bool:
    """Whether the layer of this number, from 0, makes anything again."""
    return number % recompute == 0 if isinstance(recompute, int) else recompute != "none"


def run(recompute: Recompute, layer: nn.Module, *inputs: Any) -> Any:
    """The layer's outputs, with its activations kept as the policy says."""
    options: dict[str, Any] = {"context_fn": _contexts} if recompute == "selective" else {}
    return checkpoint(layer, *inputs, use_reentrant=False, **options)


def _policy(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
