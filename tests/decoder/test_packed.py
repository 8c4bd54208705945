"""Attention by documents, for GPUs: which documents, in which order and where they lie, without a GPU.

The kernels stand on GPUs only. Here each is replaced by a plain loop of the same signature that takes nothing for
granted, and what was made of its result is compared with the sdpa backend.
"""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mm.decoder import layout as layout_module
from mm.decoder.attention.backends import BACKENDS, auto, packed, sdpa, varlen
from mm.decoder.attention.backends.auto import Ask, choose
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.attention.latent import LatentAttention
from mm.decoder.attention.windows import LocalGlobal
from mm.decoder.layout import Layout, Packed, Places

H, G = 4, 2


def layout(*rows: list[int], branches: bool = False) -> Layout:
    """A row is the lengths of its documents; a negative one is padding."""
    ids, index = [], []
    for row in rows:
        number = 0
        ids.append([])
        index.append([])
        for length in row:
            number += length > 0
            ids[-1] += [number if length > 0 else 0] * abs(length)
            index[-1] += list(range(length)) if length > 0 else [0] * -length
    where = Places(torch.tensor(index), torch.tensor(ids), torch.zeros(len(ids), len(ids[0]), dtype=torch.long))
    where.branch_ids[-1, -1] = int(branches)
    return Layout(where, where, where.index[..., None].expand(-1, -1, 3))


def loop(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, left: int) -> Tensor:
    """What no document covers is left as NaN, as a kernel leaves what was in memory."""
    assert q.ndim == k.ndim == v.ndim == 3 and q.shape[2] == k.shape[2] == v.shape[2]
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256 and q.shape[1] % k.shape[1] == 0
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and isinstance(longest, int)
    parts = [q.new_full((int(bounds[0]), *q.shape[1:]), torch.nan)]
    share = q.shape[1] // k.shape[1]
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert 0 < end - start <= longest
        at = torch.arange(end - start)
        seen = (at <= at[:, None]) & ((at[:, None] - at <= left) if left >= 0 else True)
        part, keys, values = q[start:end], *(x[start:end].repeat_interleave(share, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", part, keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hts,shd->thd", weights, values))
    parts.append(q.new_full((len(q) - int(bounds[-1]), *q.shape[1:]), torch.nan))
    return torch.cat(parts)


def by_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k and scale is not None and return_aux is None
    assert window_size[1] == 0
    return loop(query, key, value, cu_seq_q, max_q, scale, window_size[0])


def by_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k and softmax_scale is not None
    assert causal and not dropout_p and not softcap and window_size[1] in (-1, 0)
    return loop(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels by the loop, on the CPU and in float64."""
    monkeypatch.setattr(packed, "DEVICES", ("cpu",))
    monkeypatch.setattr(packed, "DTYPES", (torch.float64,))
    monkeypatch.setattr(varlen, "varlen_attn", by_varlen)
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = by_flash  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(layout_module, "PADDING", 4)


LAYOUTS = {
    "ragged": ([5, 1, 9, 2], [17]),
    "padding after": ([5, 3, -9], [16, -1]),
    "padding before and between": ([-2, 6, -5, 4], [-17]),
    "no padding, one row": ([1, 2, 3],),
}


def test_the_loop_has_the_kernels_signature() -> None:
    ours, theirs = (inspect.signature(call).parameters for call in (by_varlen, varlen_attn))
    found = {name: (each.kind, each.default) for name, each in theirs.items() if name in ours}
    assert found == {name: (each.kind, each.default) for name, each in ours.items()}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("widths", [(8, 8), (6, 5), (12, 8)], ids=str)
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_documents_by_their_bounds_are_sdpa(backend: str, rows: Any, widths: Any, window: int | None) -> None:
    results = []
    for name in ("sdpa", backend):
        lay = layout(*rows)
        torch.manual_seed(0)
        shape = lay.queries.index.shape
        sizes = (H, widths[0]), (G, widths[0]), (G, widths[1])
        q, k, v = (torch.randn(*shape, *size, dtype=torch.float64, requires_grad=True) for size in sizes)
        y = BACKENDS[name](q, k, v, lay, scale=0.4, window=window)
        padding = lay.queries.document_ids == 0
        assert name == "sdpa" or not y[padding].any()
        y.masked_fill(padding[..., None, None], 0.0).square().sum().backward()
        results.append([y[~padding], q.grad, k.grad, v.grad])
    assert results[0][0].shape[1:] == (H, widths[1])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_padding_stands_in_short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' work is the sum of squares of the lengths: 1,000 positions of padding are 8 x 128^2, not 1000^2."""
    lay = layout([40, -1000], [300, 500, -240])
    found = lay.packed()
    lengths = found.bounds.diff()
    assert found.bounds[0] == 0 and found.bounds[-1] == 2 * 1040
    assert found.longest == 500
    real = [40, 300, 500]
    assert sorted(set(lengths.tolist()) & set(real)) == real
    assert sum(n * n for n in lengths.tolist()) <= sum(n * n for n in real) + (1000 + 240) * layout_module.PADDING
    assert lay.packed() is found
    assert layout([3, 4]).packed().padding is None


@pytest.mark.usefixtures("kernels")
def test_bounds_are_made_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(layout_module, "Packed", lambda *parts: made.append(Packed(*parts)) or made[-1])
    lay = layout([5, 4], [9])
    for _ in range(3):
        q = torch.randn(2, 9, H, 8, dtype=torch.float64)
        varlen.attend(q, q, q, lay, scale=1.0)
    assert len(made) == 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("make", [GroupedAttention, LatentAttention])
def test_mixers_with_it(make: Any) -> None:
    options: dict[str, Any] = (
        {"kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 6} if make is LatentAttention else {}
    )
    one = make(32, heads=4, **options).double()
    other = make(32, heads=4, backend="varlen", **options).double()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, found = (mixer(x, layout([5, 1, 9, -2], [17])) for mixer in (one, other))
    # Rotary tables and the other backend's softmax are float32.
    torch.testing.assert_close(found[0, :15], expected[0, :15], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_what_the_kernel_cannot_express_is_refused_by_name() -> None:
    lay = layout([5, 3])
    q = torch.zeros(1, 8, H, 8, dtype=torch.float64)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sinks": torch.zeros(H)}, "sinks"),
        ({"window": LocalGlobal()}, "a sparse pattern"),
        ({"slopes": torch.zeros(H)}, "slopes"),
        ({"softcap": 5.0}, "a soft cap"),
    ]
    for given, what in refused:
        with pytest.raises(ValueError, match=f"'varlen' does not take {what}; set backend: auto or sdpa"):
            varlen.attend(q, q, q, lay, scale=1.0, **given)
    with pytest.raises(ValueError, match="'varlen' does not take branches"):
        varlen.attend(q, q, q, layout([5, 3], branches=True), scale=1.0)
    with pytest.raises(ValueError, match="'varlen' does not take a key/value cache"):
        short = Places(*(x[:, 5:] for x in vars(lay.keys).values()))
        varlen.attend(q[:, 5:], q, q, Layout(short, lay.keys, short.index[..., None]), scale=1.0)
    wide = torch.zeros(1, 8, H, 264, dtype=torch.float64)
    with pytest.raises(ValueError, match="heads of 264 numbers"):
        varlen.attend(wide, wide, wide, lay, scale=1.0)


def test_a_cpu_and_float32_are_refused_by_name() -> None:
    q = torch.zeros(1, 8, H, 8)
    for backend in ("varlen", "flash"):
        with pytest.raises(ValueError, match=r"does not take float32 \(float16, bfloat16\), the device cpu \(a GPU\)"):
            BACKENDS[backend](q, q, q, layout([8]), scale=1.0)


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("ask", "chosen"),
    [
        (Ask("cpu", HALF), "sdpa"),
        (Ask("cpu", torch.float32, has_flash=True), "sdpa"),
        (Ask("mps", HALF), "sdpa"),
        (Ask("cuda", torch.float32), "sdpa"),
        (Ask("cuda", HALF), "varlen"),
        (Ask("cuda", torch.float16, width=256), "varlen"),
        (Ask("cuda", HALF, width=576), "sdpa"),
        (Ask("cuda", HALF, has_flash=True), "flash"),
        (Ask("cuda", HALF, has_flash=True, softcap=True), "flash"),
        (Ask("cuda", HALF, softcap=True), "flex"),
        (Ask("cuda", HALF, has_flash=True, sinks=True), "flex"),
        (Ask("cuda", HALF, slopes=True), "flex"),
        (Ask("cuda", HALF, pattern=True), "flex"),
        (Ask("cuda", HALF, branches=True), "flex"),
        (Ask("cuda", HALF, cached=True), "sdpa"),
        (Ask("cuda", HALF, cached=True, sinks=True), "sdpa"),
    ],
    ids=str,
)
def test_what_auto_chooses(ask: Ask, chosen: str) -> None:
    assert choose(ask) == chosen


def test_auto_on_a_cpu_is_sdpa() -> None:
    lay, q = layout([5, 3]), torch.randn(1, 8, H, 6)
    given: dict[str, Any] = {"scale": 0.3, "softcap": 2.0, "sinks": torch.randn(H), "window": LocalGlobal(2, 3)}
    assert torch.equal(auto.attend(q, q, q, lay, **given), sdpa.attend(q, q, q, lay, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("widths", [(64, 64), (192, 128), (36, 20)], ids=str)
@pytest.mark.parametrize("backend", ["varlen", "auto", "flash"])
def test_the_kernel_is_sdpa(backend: str, widths: Any, window: int | None) -> None:
    """On CUDA in bfloat16, values and gradients, against sdpa in float32 on the same rounded numbers."""
    if backend == "flash":
        pytest.importorskip("flash_attn")
    results = []
    for name, dtype in (("sdpa", torch.float32), (backend, torch.bfloat16)):
        torch.manual_seed(0)
        lay = layout([300, 1, 129, 70], [100, 200, -200])
        where = Places(*(x.cuda() for x in vars(lay.keys).values()))
        lay = Layout(where, where, lay.positions.cuda())
        sizes = (H, widths[0]), (G, widths[0]), (G, widths[1])
        q, k, v = (torch.randn(2, 500, *size).cuda().bfloat16().to(dtype).requires_grad_() for size in sizes)
        y = BACKENDS[name](q, k, v, lay, scale=widths[0] ** -0.5, window=window)
        y = y.masked_fill((where.document_ids == 0)[..., None, None], 0.0)
        y.float().square().sum().backward()
        results.append([x.float() for x in (y, q.grad, k.grad, v.grad) if x is not None])
    for ours, theirs in zip(results[1], results[0], strict=True):
        # bfloat16 keeps 8 bits, and the backward pass rounds scores, weights and their gradients: 2 % of the largest
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9999
