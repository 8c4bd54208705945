"""Small real parts for tests: a tokenizer trained on a few words, tiny decoders, batches of random text and media."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.moe import SparseMoE
from mm.types import IGNORE, SLOT_IDS, Batch, MediaBatch, Tokens


def tiny_decoder(
    width: int = 32,
    layers: int = 2,
    vocab_size: int | None = 97,
    mixer: Callable[[int], nn.Module] | None = None,
    ffn: Callable[[int], nn.Module] | None = None,
    **options: Any,
) -> Decoder:
    """One dense layer and then sparse ones (or `ffn` everywhere), random weights large enough to tell things apart."""
    mixer = mixer or partial(GroupedAttention, heads=4, kv_heads=2)
    ffns = {"first": ffn or partial(GatedFFN, hidden=48), "rest": ffn or partial(SparseMoE, hidden=24, num_experts=4)}
    groups = [LayerGroup(["m/first"]), LayerGroup(["m/rest"], layers - 1)]
    decoder = Decoder(width, {"m": mixer}, ffns, groups, vocab_size, **options)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return decoder


def element_batch(
    rows: list[list[tuple[int, int, str]]],
    media: dict[str, list[Tokens]] | None = None,
    lengths: dict[str, list[int]] | None = None,
) -> Batch:
    """A Batch from rows of (document, branch, element), an element being a text id as a string or a kind of media.

    Media items are taken from `media[kind]` in raster order; `lengths[kind]` are their slot lengths (by default their
    token counts).
    """
    width = max(len(row) for row in rows)
    ids, documents, branches = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    slots: dict[str, list[tuple[int, int]]] = {}
    for r, row in enumerate(rows):
        for c, (document, branch, element) in enumerate(row):
            documents[r, c], branches[r, c] = document, branch
            ids[r, c] = SLOT_IDS[element] if element in SLOT_IDS else int(element)
            if element in SLOT_IDS:
                slots.setdefault(element, []).append((r, c))
    batches = {}
    for kind, places in slots.items():
        items = (media or {})[kind]
        counts = (lengths or {}).get(kind) or [len(item) for item in items]
        where = torch.tensor(places)
        names = [f"sample {r}: {kind} {c}" for r, c in places]
        batches[kind] = MediaBatch(Tokens.stack(items), where[:, 0], where[:, 1], torch.tensor(counts), names)
    return Batch(ids, torch.full_like(ids, IGNORE), documents, branches, batches)


def finite_nonzero_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; raises AssertionError naming one that is missing, zero or not finite."""
    gradients = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name}: no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name}: gradient not finite"
        assert parameter.grad.abs().max() > 0, f"{name}: gradient is zero"
        gradients[name] = parameter.grad
    return gradients
