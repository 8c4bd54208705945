"""The chunked scan against a sum over visible pairs, one pair at a time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.attention.paths import Paths
from mm.decoder.attention.scan import scan
from mm.decoder.layout import Layout, Places


def close(actual: Tensor, expected: Tensor, what: str | None = None) -> None:
    """float32 sums of tens of terms in another order: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=what)


def layout_of(documents: list[list[int]], branches: list[list[int]] | None = None, past: Any = None) -> Layout:
    ids = torch.tensor(documents)
    branch = torch.zeros_like(ids) if branches is None else torch.tensor(branches)
    here = Places(torch.zeros_like(ids), ids, branch)
    before = None if past is None else Places(*(torch.tensor(past) * scale for scale in (0, 1, 0)))
    return Layout(here, before.append(here) if before else here, torch.zeros(*ids.shape, 3))


def by_pairs(x: Tensor, b: Tensor, c: Tensor, decay: Tensor, layout: Layout) -> Tensor:
    """y_t = sum over visible s of exp(sum of the decays after s on t's path) (c_t . b_s) x_s, one pair at a time."""
    visible = layout.mask()[:, 0] & (layout.keys.document_ids > 0)[:, None]
    y = torch.zeros_like(x)
    per_group = x.shape[2] // b.shape[2]
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            path = visible[row, t].nonzero()[:, 0].tolist()
            for place, s in enumerate(path):
                left = decay[row, path[place + 1 :]].sum(0).exp()  # (H,)
                weight = (c[row, t] * b[row, s]).sum(-1).repeat_interleave(per_group)
                y[row, t] += (left * weight)[:, None] * x[row, s]
    return y


LAYOUTS: dict[str, tuple[Any, Any]] = {
    "one document": ([[1] * 11], None),
    "padded on either side": ([[0, 0] + [1] * 9, [1] * 7 + [0] * 4], None),
    "packed": ([[1] * 3 + [2] + [3] * 7, [1] * 5 + [2] * 4 + [0] * 2], None),
    "branches": (
        [[1] * 9 + [2, 2], [1] * 2 + [2] * 6 + [0] * 3],
        [[0] * 4 + [1, 1, 2, 3, 3] + [0, 0], [0, 0, 0, 1, 2, 2, 2, 3, 0, 0, 0]],
    ),
    "branches without a common part": ([[1] * 5 + [2] * 6], [[1, 1, 2, 2, 2, 0, 0, 1, 1, 2, 2]]),
    "nothing common at all": ([[1] * 11], [[1] * 4 + [2] * 7]),
}


@pytest.mark.parametrize("decaying", [True, False])
@pytest.mark.parametrize("case", LAYOUTS)
def test_scan_equals_the_sum_over_visible_pairs(case: str, decaying: bool) -> None:
    torch.manual_seed(0)
    layout = layout_of(*LAYOUTS[case])
    rows, length = layout.queries.document_ids.shape
    x, b, c = torch.randn(rows, length, 4, 3), torch.randn(rows, length, 2, 5), torch.randn(rows, length, 2, 5)
    decay = -3 * torch.rand(rows, length, 4)
    paths = Paths.of(layout)
    x, decay = x * paths.real[..., None, None], decay * paths.real[..., None]
    expected = by_pairs(x, b, c, decay if decaying else torch.zeros_like(decay), layout)
    for chunk in (1, 3, 4, 64):
        y, _ = scan(x, b, c, decay if decaying else None, paths, chunk)
        close(y[paths.real], expected[paths.real])


@pytest.mark.parametrize("pieces", [[11], [4, 7], [1] * 11, [2, 1, 8]])
def test_scan_goes_on_from_a_state(pieces: list[int]) -> None:
    torch.manual_seed(0)
    x, b, c, decay = torch.randn(2, 11, 2, 3), torch.randn(2, 11, 1, 5), torch.randn(2, 11, 1, 5), -torch.rand(2, 11, 2)
    whole, end = scan(x, b, c, decay, Paths.of(layout_of([[1] * 11] * 2)), 4)
    state, parts, done = None, [], 0
    for size in pieces:
        layout = layout_of([[1] * size] * 2, past=[[1] * done] * 2 if done else None)
        here = slice(done, done + size)
        y, state = scan(x[:, here], b[:, here], c[:, here], decay[:, here], Paths.of(layout), 4, state)
        parts.append(y)
        done += size
    assert state is not None
    close(torch.cat(parts, 1), whole)
    close(state, end)


def test_strong_decay_keeps_its_digits() -> None:
    """After decays that sum to thousands, differences of one float32 running sum would be off by 1e-3 and more."""
    torch.manual_seed(0)
    rows, length = 1, 32
    x, b, c = torch.randn(rows, length, 1, 2), torch.randn(rows, length, 1, 4), torch.randn(rows, length, 1, 4)
    decay = torch.where(torch.arange(length) % 16 < 12, torch.tensor(-150.0), torch.tensor(-0.01))[None, :, None]
    layout = layout_of([[1] * length])
    y, _ = scan(x, b, c, decay, Paths.of(layout), 32)
    exact = by_pairs(x.double(), b.double(), c.double(), decay.double(), layout)
    torch.testing.assert_close(y.double(), exact, atol=2e-6, rtol=1e-6)


def test_scan_gradients_equal_those_of_the_sum() -> None:
    torch.manual_seed(0)
    layout = layout_of(*LAYOUTS["branches"])
    paths = Paths.of(layout)
    shapes = [(2, 11, 2, 3), (2, 11, 1, 4), (2, 11, 1, 4), (2, 11, 2)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    upstream = torch.randn(2, 11, 2, 3) * paths.real[..., None, None]
    grads = []
    for chunked in (True, False):
        x, b, c, decay = inputs
        x, decay = x * paths.real[..., None, None], -F.softplus(decay) * paths.real[..., None]
        y = scan(x, b, c, decay, paths, 4)[0] if chunked else by_pairs(x, b, c, decay, layout)
        grads.append(torch.autograd.grad((y * upstream).sum(), inputs))
    for ours, pairs in zip(*grads, strict=True):
        close(ours, pairs)
