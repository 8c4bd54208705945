"""Balance rules against their formulas: ends of each scale, documents, dropped choices, and the bias update."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.ffn.balance import Balance, dropped_share, sequence_loss, switch_loss, variance_loss
from mm.decoder.ffn.moe import SparseMoE, limit_capacity
from mm.types import Routing

E = 4


def top_1(experts: list[int], scores: Tensor | None = None, mask: list[int] | None = None) -> Routing:
    indices = torch.tensor(experts)[:, None]
    scores = F.one_hot(indices[:, 0], E).float() if scores is None else scores
    real = torch.ones(len(experts), dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    return Routing(indices, torch.ones(len(experts), 1), scores, scores, real)


def test_variance_is_zero_when_even_and_e_minus_one_when_collapsed() -> None:
    assert variance_loss(top_1([0, 1, 2, 3])) == 0
    assert variance_loss(top_1([2, 2, 2, 2])) == pytest.approx(E - 1)
    counts = torch.tensor([3.0, 1.0, 0.0, 2.0])
    cv = counts.var(correction=0) / counts.mean() ** 2
    assert variance_loss(top_1([0, 0, 0, 1, 3, 3])) == pytest.approx(float(cv))


def test_variance_has_a_gradient_against_the_busy() -> None:
    logits = torch.zeros(4, E, requires_grad=True)
    variance_loss(top_1([2, 2, 2, 1], logits.softmax(-1))).backward()
    assert logits.grad is not None
    push = logits.grad.sum(0)
    assert push[2] > push[1] > push[0] and push[0] == push[3]  # what descends: less of 2, more of 0 and 3


def test_sequence_loss_sees_what_the_batch_hides() -> None:
    """Two documents, each with an expert of its own: even as a batch, collapsed one by one."""
    routing = top_1([0, 0, 1, 1])
    documents = torch.tensor([[1, 1, 2, 2]])
    assert switch_loss(routing) == pytest.approx(E / 2)
    assert sequence_loss(routing, documents) == pytest.approx(E)
    assert sequence_loss(routing, torch.tensor([[1, 1], [1, 1]])) == pytest.approx(E)  # rows are apart too


def test_sequence_loss_is_the_papers() -> None:
    """DeepSeek-V3, equations 17-20, written as they stand, over documents of unequal length and padding."""
    torch.manual_seed(0)
    affinity, chosen = torch.rand(10, E), 2
    indices = affinity.topk(chosen, -1).indices
    scores = affinity / affinity.sum(-1, keepdim=True)
    documents = torch.tensor([[1, 1, 1, 2, 0], [1, 1, 1, 1, 0]])
    routing = Routing(indices, scores, affinity, scores, documents.flatten() > 0)
    expected = []
    for places in ([0, 1, 2], [3], [5, 6, 7, 8]):
        f = torch.zeros(E)
        for t in places:
            f[indices[t]] += E / (chosen * len(places))
        expected.append((f * scores[places].mean(0)).sum())
    assert sequence_loss(routing, documents) == pytest.approx(float(torch.stack(expected).mean()))


def test_sequence_rule_needs_documents() -> None:
    with pytest.raises(ValueError, match=r"Balance.sequence needs the documents"):
        Balance(sequence=0.1).losses([top_1([0, 1])])


def test_weights_add_up_and_layers_average() -> None:
    a, b = top_1([0, 1, 2, 3]), top_1([1, 1, 1, 1])
    terms = Balance(switch=0.5, z=0, variance=0.25).losses([a, b])
    assert terms["balance/switch"] == pytest.approx(0.5 * (1 + E) / 2)
    assert terms["balance/variance"] == pytest.approx(0.25 * (E - 1) / 2)


def test_what_was_dropped_is_still_demanded() -> None:
    """A full expert must not look balanced because its surplus was cut off."""
    routing = top_1([0, 0, 0, 0, 0, 1, 2, 3])
    limited = limit_capacity(routing, 1.0)
    assert limited.load().tolist() == [2, 1, 1, 1]
    assert switch_loss(limited) == switch_loss(routing) and variance_loss(limited) == variance_loss(routing)
    assert dropped_share([limited]) == pytest.approx(3 / 8) and dropped_share([routing]) is None


def test_bias_update_has_a_speed_and_a_tolerance() -> None:
    layer = SparseMoE(8, 4, num_experts=E)
    load = torch.tensor([10.0, 11.0, 8.0, 11.0])  # mean 10
    Balance(bias_rate=0.01).update_biases([layer], [load])
    torch.testing.assert_close(layer.router.bias, torch.tensor([0.0, -0.01, 0.01, -0.01]))
    Balance(bias_rate=0.01, bias_tolerance=0.15).update_biases([layer], [load])
    torch.testing.assert_close(layer.router.bias, torch.tensor([0.0, -0.01, 0.02, -0.01]))
    assert layer.router.bias.grad_fn is None


def test_layers_of_different_widths_are_updated() -> None:
    layers = [SparseMoE(8, 4, num_experts=n) for n in (3, 5)]
    Balance(bias_rate=0.1).update_biases(layers, [torch.arange(3.0), torch.arange(5.0)])
    assert [layer.router.bias.tolist()[0] for layer in layers] == pytest.approx([0.1, 0.1])
