"""The loss without logits: values and every gradient are those of the plain one, and the logits are never held."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder.embedding import Head, Projection
from mm.objectives import cross_entropy as module
from mm.objectives.cross_entropy import cross_entropy

N, D, V = 37, 16, 50
HEADS = {"plain": Head(), "bias": Head(bias=True), "softcap": Head(softcap=3.0), "scaled": Head(scale=0.25, bias=True)}


@pytest.fixture(params=["one chunk", "many chunks"], autouse=True)
def chunk(request, monkeypatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(module, "CHUNK", {"cpu": 7 * V})  # 37 rows: five of 7 and a rest
        monkeypatch.setattr(module, "LEAST_ROWS", 1)


def made(options: Head, dtype: torch.dtype = torch.float32) -> tuple[Projection, Tensor, Tensor]:
    torch.manual_seed(0)
    matrix = nn.Linear(D, V, bias=options.bias).to(dtype)
    hidden = (3 * torch.randn(N, D)).to(dtype).requires_grad_()
    return Projection(matrix, options), hidden, torch.randint(V, (N,))


def plain(head: Projection, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


def gradients(loss: Tensor, head: Projection, hidden: Tensor) -> list[Tensor | None]:
    parts = [hidden, *head.matrix.parameters()]
    for part in parts:
        part.grad = None
    (2.5 * loss).backward()
    return [part.grad for part in parts]


@pytest.mark.parametrize("name", HEADS)
def test_values_and_gradients_are_the_plain_ones(name: str) -> None:
    head, hidden, labels = made(HEADS[name])
    found, right = cross_entropy(head, hidden, labels)
    wanted, count = plain(head, hidden, labels)
    torch.testing.assert_close(found, wanted)
    assert right == count
    for ours, theirs in zip(gradients(found, head, hidden), gradients(wanted, head, hidden), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cast", ["bfloat16 weights", "autocast"])
def test_bfloat16(cast: str) -> None:
    """Three digits: products round to 8 bits in both, in another order."""
    head, hidden, labels = made(Head(bias=True), torch.bfloat16 if cast == "bfloat16 weights" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        found, _ = cross_entropy(head, hidden, labels)
        wanted, _ = plain(head, hidden, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
    for ours, theirs in zip(gradients(found, head, hidden), gradients(wanted, head, hidden), strict=True):
        assert ours is not None and theirs is not None and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_what_is_frozen_gets_no_gradient_and_a_graph_may_be_used_twice() -> None:
    head, hidden, labels = made(Head())
    head.matrix.weight.requires_grad_(False)
    loss, _ = cross_entropy(head, hidden, labels)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(again, 3 * first)

    head.matrix.weight.requires_grad_(True)
    loss, _ = cross_entropy(head, hidden.detach(), labels)
    loss.backward()
    assert head.matrix.weight.grad is not None


def test_a_tied_matrix_adds_up() -> None:
    """An embedding that is also the head's matrix gets the gradients of both."""
    head, _, labels = made(Head())
    ids = torch.randint(V, (N,))
    grads = []
    for loss_of in (cross_entropy, plain):
        head.matrix.weight.grad = None
        loss, _ = loss_of(head, F.embedding(ids, head.matrix.weight), labels)
        loss.backward()
        assert head.matrix.weight.grad is not None
        grads.append(head.matrix.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_without_labels_and_without_gradients() -> None:
    head, hidden, labels = made(Head())
    loss, right = cross_entropy(head, hidden[:0], labels[:0])
    loss.backward()
    assert loss == 0 and right == 0 and head.matrix.weight.grad is not None and not head.matrix.weight.grad.any()
    with torch.no_grad():
        found, _ = cross_entropy(head, hidden, labels)
    torch.testing.assert_close(found, plain(head, hidden, labels)[0].detach())


LARGE = """
import resource, torch
from torch import nn
from mm.decoder.embedding import Head, Projection
from mm.objectives.cross_entropy import cross_entropy
matrix = nn.Linear(256, 300_000, bias=False)
hidden = torch.randn(8192, 256, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss, _ = cross_entropy(Projection(matrix, Head()), hidden, torch.randint(300_000, (8192,)))
loss.backward()
assert matrix.weight.grad is not None
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_300000_words_and_8192_positions_take_less_than_2_gb() -> None:
    """Their logits would be 9.8 GB, in float32, and as much again for their gradient."""
    grown = int(subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True).stdout)
    print(f"{grown / 1e9:.2f} GB above the weights")
    assert grown < 2e9
