"""mm info: the rule for activations, against what autograd keeps of real layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.attention.linear import LinearAttention
from mm.decoder.attention.ssm import Mamba2
from mm.decoder.decoder import Block
from mm.decoder.decoder import Layer as DecoderLayer
from mm.decoder.ffn.dense import GatedFFN, PlainFFN
from mm.decoder.ffn.moe import SparseMoE
from mm.decoder.init import Init
from mm.decoder.layout import Layout, Places
from mm.info.memory import kept_by

LAYERS_KEPT: dict[str, tuple[Any, Any]] = {
    "attention": (partial(GroupedAttention, heads=8, kv_heads=2), partial(GatedFFN, hidden=300)),
    "experts": (partial(GroupedAttention, heads=8), partial(SparseMoE, hidden=100, num_experts=6, shared=1)),
    "mamba": (partial(Mamba2, head_dim=32, state=32), partial(PlainFFN, hidden=300)),
    "linear": (partial(LinearAttention, heads=4), partial(GatedFFN, hidden=300)),
}


@pytest.mark.parametrize("case", LAYERS_KEPT)
def test_activations_are_what_autograd_keeps(case: str) -> None:
    """The rule, against what a real layer saves. A quarter off is well within what an allocator adds."""
    torch.manual_seed(0)
    length, width = 256, 128
    mixer, ffn = LAYERS_KEPT[case]
    layer = DecoderLayer(width, mixer(width), ffn(width), Block()).apply(Init(0.02, 2))
    ones = torch.ones(1, length, dtype=torch.long)
    places = Places(torch.arange(length)[None], ones, torch.zeros_like(ones))
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return x

    x = torch.randn(1, length, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        layer(x, ones > 0, Layout(places, places, places.index[..., None].expand(-1, -1, 3)), None, 0)
    measured = sum(storage.nbytes() for storage in kept.values()) / length
    assert kept_by(layer, 4) == pytest.approx(measured, rel=0.25)
