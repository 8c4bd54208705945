"""The weight map both ways: every rule undoes itself, and says their shapes without memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm.decoder.interchange.transfer import materialise
from mm.decoder.interchange.weights import Rule, constant, fused, layers, mapped, same, stacked, transposed

RULES = {
    "same": (same("a", "x"), (3, 4)),
    "transposed": (transposed("a", "x"), (3, 4)),
    "fused": (fused("a", ["q", "k", "v"], rows=[4, 2, 2]), (8, 3)),
    "fused_bias": (fused("a", ["q", "k", "v"], rows=[4, 2, 2]), (8,)),
    "stacked": (stacked("a", ["e.{e}.w2"], count=5), (5, 3, 4)),
    "stacked_pairs": (stacked("a", ["e.{e}.w1", "e.{e}.w3"], count=5, rows=[3, 3]), (5, 6, 4)),
    "mapped": (mapped("a", "x", lambda x: x + 1, lambda x: x - 1), (4,)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_undoes_itself(name: str) -> None:
    rule, shape = RULES[name]
    assert rule.export is not None
    ours = torch.randn(shape)
    theirs = rule.export([ours])
    assert len(theirs) == len(rule.theirs)
    (again,) = rule.load(theirs)
    torch.testing.assert_close(again, ours)
    assert rule.their_shapes([shape]) == [tuple(x.shape) for x in theirs]


def test_experts_stand_in_the_order_of_their_names() -> None:
    rule = stacked("a", ["e.{e}.gate", "e.{e}.up"], count=2, rows=[1, 1])
    assert rule.theirs == ("e.0.gate", "e.0.up", "e.1.gate", "e.1.up")
    (whole,) = rule.load([torch.full((1, 2), float(i)) for i in range(4)])
    assert whole[:, :, 0].tolist() == [[0, 1], [2, 3]]


def test_layers_number_every_name_and_leave_experts_alone() -> None:
    first, second = layers([0, 3], [fused("l.{i}.a", ["m.{i}.x.{e}"], rows=[1])])
    assert (first.ours, first.theirs) == (("l.0.a",), ("m.0.x.{e}",))
    assert (second.ours, second.theirs) == (("l.3.a",), ("m.3.x.{e}",))
    (bias,) = layers([2], [constant("l.{i}.b", 0.0)])
    assert (bias.ours, bias.value) == (("l.2.b",), 0.0)


def test_a_packed_form_states_its_shapes() -> None:
    rule = Rule(("a",), ("blocks", "scales"), load=list, shapes=lambda ours: [(*ours[0][:-1], 4, 16), (2,)])
    assert rule.their_shapes([(3, 128)]) == [(3, 4, 16), (2,)]


def test_a_decoder_that_does_not_fit_its_map_is_said_to() -> None:
    with pytest.raises(ValueError, match=r"tensor a of shape \(7, 2\) does not fit its weight map"):
        fused("a", ["x", "y"], rows=[4, 4]).their_shapes([(7, 2)])


def test_materialise_keeps_what_is_shared_shared() -> None:
    with torch.device("meta"):
        a, b = nn.Linear(3, 5, bias=False), nn.Embedding(5, 3)
        b.weight = a.weight
        module = nn.ModuleList([a, b, nn.BatchNorm1d(2)])
    materialise(module, "cpu", torch.bfloat16)
    assert a.weight is b.weight and a.weight.dtype == torch.bfloat16 and a.weight.device.type == "cpu"
    assert module[2].get_buffer("num_batches_tracked").dtype == torch.int64
