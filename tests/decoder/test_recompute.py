"""Activation checkpointing: no policy changes a gradient, and what is kept and multiplied again is as it says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mm.decoder.decoder import Decoder
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.dispatch import Dispatch
from mm.decoder.ffn.moe import moe_layers
from mm.fusion.splice import splice
from mm.parts import build
from mm.testing import element_batch, tiny_decoder
from mm.types import Sequence

POLICIES = ("none", "selective", 2, "full")


def packed(decoder: Decoder, length: int = 40) -> Sequence:
    """A row of two documents, and one with padding at its end."""
    rows = [
        [(1 + (i > 15), 0, str(5 + i)) for i in range(length)],
        [(int(i < 30), 0, str(7 + i)) for i in range(length)],
    ]
    return splice(element_batch(rows), decoder.embed, {}, nn.Embedding(3, decoder.width))


def step(decoder: Decoder, policy: Any) -> tuple[dict[str, Tensor], int]:
    """The gradients, and the bytes that were kept for the backward pass outside of recomputed parts."""
    decoder.checkpoint_activations = policy
    decoder.zero_grad()
    sequence, kept = packed(decoder), {}
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), saved)  # held, so that no address comes twice
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        hidden, routings = decoder(sequence)
        loss = hidden.square().sum() + sum(r.logits.square().sum() for r in routings if r is not None)
    bytes_kept = sum(size for size, _ in kept.values())
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}, bytes_kept


@pytest.mark.parametrize("dispatch", ["slices", "grouped"])
@pytest.mark.parametrize("cross", [False, True])
def test_no_policy_changes_a_gradient(cross: bool, dispatch: Dispatch) -> None:
    torch.manual_seed(0)
    decoder = tiny_decoder(layers=4).train()
    for layer in moe_layers(decoder):
        layer.experts.dispatch = dispatch
    if cross:
        decoder.add_cross_attention()
    found = {policy: step(decoder, policy) for policy in POLICIES}
    plain, _ = found["none"]
    for gradients, _ in found.values():
        assert gradients.keys() == plain.keys() and len(plain) > 10
        for name, gradient in gradients.items():
            # the same operators on the same numbers; only sums over scattered tokens may take another order
            torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-5 * float(plain[name].abs().max()))


def test_layers_that_are_recomputed_keep_less() -> None:
    torch.manual_seed(0)
    decoder = tiny_decoder(layers=4).train()
    kept = {policy: step(decoder, policy)[1] for policy in ("none", 2, "full")}
    assert kept["full"] < kept[2] < kept["none"], kept
    assert kept["full"] < kept["none"] / 3, kept


@pytest.mark.parametrize("given,meant", [(True, "full"), (False, "none"), (3, 3)])
def test_true_and_false_are_what_older_configs_have(given: Any, meant: Any) -> None:
    tree = {"class_path": "mm.decoder.decoder.Decoder", "init_args": {
        "width": 16, "mixers": {"m": {"class_path": "mm.decoder.attention.grouped.GroupedAttention"}},
        "ffns": {"f": {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 8}}},
        "layers": [{"pattern": ["m/f"]}], "vocab_size": 9, "checkpoint_activations": given,
    }}  # fmt: skip
    assert build(tree, Decoder).checkpoint_activations == meant


@pytest.mark.parametrize("policy", [0, -1, "some", 1.5])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint_activations must be none, full, selective or a number"):
        tiny_decoder(checkpoint_activations=policy)


@pytest.mark.parametrize("dispatch", [None, "slices", "grouped"])
def test_selective_multiplies_nothing_again_but_experts_by_slices(dispatch: Dispatch | None) -> None:
    """None is a decoder without experts."""
    torch.manual_seed(0)
    ffn, flops = partial(GatedFFN, hidden=48) if dispatch is None else None, {}
    decoder = tiny_decoder(layers=4, ffn=ffn).train()
    for layer in moe_layers(decoder):
        layer.experts.dispatch = dispatch or "auto"
    for policy in POLICIES:
        with FlopCounterMode(display=False) as counter:
            step(decoder, policy)
        flops[policy] = counter.get_total_flops()
    assert flops["none"] < flops[2] < flops["full"] and flops["selective"] < flops["full"], flops
    assert (flops["selective"] > flops["none"]) == (dispatch == "slices"), flops
