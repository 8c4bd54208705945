"""Attention of one query a row: right, the same to the last bit whatever stands beside it, used where it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.decoder import kernels
from mm.decoder.attention import one_query as module
from mm.decoder.attention.backends import sdpa
from mm.decoder.attention.one_query import one_query, suits
from mm.decoder.layout import Layout, Places

# Rows, keys, query heads, key/value heads, widths: beside the kernel's vectors and blocks, many queries a head, MLA's.
SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 7, 4, 2, 8, 8), (3, 300, 6, 2, 20, 33), (2, 513, 10, 5, 64, 64), (1, 257, 24, 1, 65, 40),
    (2, 600, 3, 3, 80, 96), (2, 270, 16, 1, 576, 512),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def some(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys, heads, groups, width, value_width = shape
    parts = (rows, heads, width), (rows, keys, groups, width), (rows, keys, groups, value_width)
    q, k, v = (torch.randn(part).to(dtype) for part in parts)
    return q, k, v


def exactly(q, k, v, seen, scale, softcap=None, sinks=None) -> Tensor:
    q, k, v = q.double(), *(part.double().repeat_interleave(q.shape[1] // k.shape[2], 2) for part in (k, v))
    scores = torch.einsum("bhd,bshd->bhs", q, k) * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores if seen is None else scores.masked_fill(~seen[:, None], float("-inf"))
    sink = torch.full((1, q.shape[1], 1), float("-inf")) if sinks is None else sinks.double()[None, :, None]
    weights = torch.cat([scores, sink.double().expand(len(q), -1, 1)], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhs,bshe->bhe", weights, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert kernels.available()  # or torch would be compared with itself
    q, k, v = some(shape, dtype)
    seen = torch.rand(k.shape[:2]) < 0.5
    seen[:, 0] = True
    for softcap in (None, 3.0):
        for sinks in (None, torch.randn(shape[2])):
            for sees in (None, seen):
                y = one_query(q, k, v, sees, shape[4] ** -0.5, softcap, sinks)
                exact = exactly(q, k, v, sees, shape[4] ** -0.5, softcap, sinks)
                assert y.dtype == dtype
                # Rounding of scores of order 1, of exponentials (two units) and, in bfloat16, of the result.
                bound = 2e-6 if dtype == torch.float32 else 2**-8 * exact.abs() + 2e-6
                assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_in_a_batch_what_it_gets_alone(dtype: torch.dtype) -> None:
    q, k, v = some((3, 900, 6, 2, 20, 24), dtype)
    seen = torch.rand(3, 900) < 0.6
    y = one_query(q, k, v, seen, 0.2)
    for row in range(3):
        keys, values = (x[row : row + 1, seen[row]] for x in (k, v))
        assert torch.equal(one_query(q[row : row + 1], keys, values, None, 0.2)[0], y[row])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(one_query(q, k, v, seen, 0.2), y)
    finally:
        torch.set_num_threads(threads)


def test_tensors_that_are_parts_of_others() -> None:
    q, k, v = some((2, 40, 6, 3, 16, 16), torch.float32)
    y = one_query(q, k, v, None, 0.25)
    room = torch.full((2, 50, 3, 48), float("nan"))
    room[:, :40, :, :16], room[:, :40, :, 32:] = k, v
    seen = torch.ones(2, 80, dtype=torch.bool)[:, ::2]
    heads = torch.stack([q, q], 1)[:, 1]
    assert torch.equal(one_query(heads, room[:, :40, :, :16], room[:, :40, :, 32:], seen, 0.25), y)
    keys, values = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (k, v))
    assert torch.equal(one_query(q, keys, values, None, 0.25), y)


def test_what_is_not_seen_is_not_read_and_what_is_damaged_stays_visible() -> None:
    q, k, v = some((2, 30, 4, 2, 8, 8), torch.float32)
    k[0, 3], v[0, 3] = float("nan"), float("inf")
    seen = torch.ones(2, 30, dtype=torch.bool)
    seen[0, 3] = False
    assert one_query(q, k, v, seen, 1.0).isfinite().all()
    assert one_query(q, k, v, None, 1.0)[0].isnan().all()
    seen[1] = False
    assert (one_query(q, k, v, seen, 1.0)[1] == 0).all()
    assert (one_query(q, k[:, :0], v[:, :0], None, 1.0) == 0).all()
    far = torch.full_like(q, 1e4)  # a key that outweighs the others by more than a float32 can hold
    assert torch.equal(one_query(far[:1], k[:1, :2], v[:1, :2], None, 1.0), _largest(far[:1], k[:1, :2], v[:1, :2]))


def _largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bgrd,bsgd->bgrs", q.unflatten(1, (k.shape[2], -1)), k)
    return torch.stack([v[0, best, head] for head, best in enumerate(scores[0, :, 0].argmax(-1))])[
        None
    ].repeat_interleave(q.shape[1] // k.shape[2], 1)


def test_without_a_compiler_torch_computes_the_same() -> None:
    q, k, v = some((2, 50, 6, 2, 16, 24), torch.float32)
    seen, sinks = torch.rand(2, 50) < 0.7, torch.randn(6)
    for softcap, sink, sees in ((0.0, None, seen), (0.0, None, None), (2.0, None, seen), (0.0, sinks, seen)):
        y = one_query(q, k, v, sees, 0.3, softcap or None, sink)
        torch.testing.assert_close(module._with_torch(q, k, v, sees, 0.3, softcap, sink), y)


def test_what_does_not_fit_together() -> None:
    q, k, v = some((2, 5, 6, 2, 8, 8), torch.float32)
    seen = torch.ones(2, 5, dtype=torch.bool)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((q.double(), k, v, seen, 1.0), r"one_query: q \(B, H, d\)"),
        ((q[:, :5], k, v, seen, 1.0), r"one_query: q \(B, H, d\)"),
        ((q[..., :7], k, v, seen, 1.0), r"one_query: q \(B, H, d\)"),
        ((q, k[:, :4], v, seen, 1.0), r"one_query: q \(B, H, d\)"),
        ((q, k.transpose(2, 3).contiguous().transpose(2, 3), v, seen, 1.0), "side by side"),
        ((q, k, v, seen.long(), 1.0), r"seen \(B, S\) bool"),
        ((q, k, v, seen[:, :4], 1.0), r"seen \(B, S\) bool"),
        ((q, k, v, seen, 1.0, None, torch.zeros(5)), r"sinks \(H,\)"),
    ]
    for wrong, said in cases:
        with pytest.raises(RuntimeError, match=said):
            one_query(*wrong)


def test_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = some((2, 5, 6, 2, 8, 8), torch.float32)
    assert suits(q[:, None], k, v)
    assert not suits(torch.stack([q, q], 1), k, v)
    assert not suits(q[:, None].double(), k.double(), v.double())
    assert not suits(q[:, None].bfloat16(), k, v)
    assert not suits(q[:, None], k.transpose(2, 3), v)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(q[:, None], k, v)
    with torch.enable_grad():
        assert not suits(q[:, None], k, v)
    asked: list[int] = []
    monkeypatch.setattr(sdpa, "one_query", lambda *parts: asked.append(1) or one_query(*parts))
    places = Places(torch.arange(5).expand(2, 5), torch.ones(2, 5).long(), torch.zeros(2, 5).long())
    last = Places(*(part[:, 4:] for part in (places.index, places.document_ids, places.branch_ids)))
    sdpa.attend(q[:, None], k, v, Layout(last, places, last.index[..., None].expand(-1, -1, 3)), scale=1.0)
    sdpa.attend_rows(q[:, None], list(k), list(v), 1.0)
    assert len(asked) == 1 + 2  # once for all, and once a row
