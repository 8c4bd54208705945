"""Attention backends against the formula in a plain loop: caps, sinks, slopes, windows, patterns, mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm.decoder.attention.backends import BACKENDS, flash, flex, sdpa
from mm.decoder.attention.windows import LocalGlobal, StreamingSinks, seen
from mm.decoder.layout import Layout, Places

H, G, D, E = 4, 2, 6, 5  # query and key heads, widths of keys and of values
WINDOWS: dict[str, Any] = {
    "none": None,
    "three": 3,
    "sinks": StreamingSinks(1, 2),
    "fixed": LocalGlobal(2, 3),
    "strided": LocalGlobal(1, 2, kind="strided", always=1),
}


def layout(past: int = 0) -> Layout:
    """Two documents and padding; one document, padded left, that ends in two branches."""
    documents = torch.tensor([[1] * 5 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 9])
    index = torch.tensor([[0, 1, 2, 3, 4] * 2 + [0, 0], [0, 0, 0, 0, 1, 2, 3, 4, 5, 4, 5, 6]])
    branches = torch.zeros_like(index)
    branches[1, 7:9], branches[1, 9:] = 1, 2
    keys = Places(index, documents, branches)
    queries = Places(index[:, past:], documents[:, past:], branches[:, past:])
    return Layout(queries, keys, queries.index[..., None].expand(-1, -1, 3))


def in_window(window, distance: int, key: int) -> bool:
    if window is None or isinstance(window, int):
        return window is None or distance < window
    if isinstance(window, StreamingSinks):
        return key < window.first or distance < window.last
    far = distance % window.stride == 0 if window.kind == "strided" else key % window.stride == window.stride - 1
    return distance < window.local or far or key < window.always


def by_loop(q, k, v, lay: Layout, scale, window=None, slopes=None, softcap=None, sinks=None) -> Tensor:
    """One query after another, its keys found one by one from the rules; all heads of a query at once."""
    out = []
    a, b = lay.queries, lay.keys
    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            columns = []
            for s in range(lay.offset + t + 1):
                same = a.document_ids[row, t] == b.document_ids[row, s]
                open_ = b.branch_ids[row, s] in (0, a.branch_ids[row, t])
                distance = int(a.index[row, t] - b.index[row, s])
                if same and open_ and in_window(window, distance, int(b.index[row, s])):
                    columns.append(s)
            keys, values = (x[row, columns][:, [h // (H // G) for h in range(H)]] for x in (k, v))  # (seen, H, ...)
            scores = (q[row, t] * keys).sum(-1) * scale  # (seen, H)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            if slopes is not None:
                scores = scores - slopes * (a.index[row, t] - b.index[row, columns])[:, None]
            if sinks is not None:
                scores = torch.cat([scores, sinks[None]])
            weights = scores.softmax(0)[: len(columns)]
            out.append((weights[..., None] * values).sum(0))
    return torch.stack(out).view(*q.shape[:3], v.shape[-1])


def inputs(lay: Layout, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    rows, length = lay.keys.index.shape
    shapes = [(rows, length - lay.offset, H, D), (rows, length, G, D), (rows, length, G, E)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "backend,past,options",
    [
        ("sdpa", 0, ""),
        ("sdpa", 0, "cap"),
        ("sdpa", 0, "sinks"),
        ("sdpa", 0, "slopes"),
        ("sdpa", 0, "cap sinks slopes"),
        ("sdpa", 10, ""),
        ("sdpa", 10, "cap sinks slopes"),
        ("flex", 0, "sinks"),
        ("flex", 10, "cap sinks slopes"),
        ("blocks", 0, ""),
        ("blocks", 0, "cap sinks slopes"),
        ("blocks", 4, ""),
        ("blocks", 4, "cap sinks slopes"),
    ],
)
def test_backends_are_the_formula(backend, past, options, window, monkeypatch):
    if backend == "blocks":  # what long rows take
        monkeypatch.setattr(sdpa, "BLOCK", 4)
        backend = "sdpa"
    lay = layout(past)
    q, k, v = inputs(lay)
    given: dict[str, Any] = {"scale": 0.7, "window": WINDOWS[window]}
    if "cap" in options:
        given["softcap"] = 1.5
    if "sinks" in options:
        given["sinks"] = torch.randn(H)
    if "slopes" in options:
        given["slopes"] = torch.rand(H)
    expected = by_loop(q, k, v, lay, **given)
    with torch.no_grad():
        y = BACKENDS[backend](q, k, v, lay, **given)
    assert y.shape == (2, q.shape[1], H, E)
    real = lay.queries.document_ids > 0
    y, expected = y[real], expected[real]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)  # the softmax may be float32


@pytest.mark.parametrize("block", [512, 4])
@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("window", [None, 3, StreamingSinks(1, 2)])
@pytest.mark.parametrize("options", ["", "softcap sinks", "slopes"])
def test_gradients_are_the_formulas(block, branches, window, options, monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK", block)
    lay, sinks = layout(), torch.randn(H, dtype=torch.float64, requires_grad=True)
    if not branches:
        lay.keys.branch_ids.zero_()
        lay.keys.index[1, 3:] = torch.arange(9)
    given: dict[str, Any] = {"scale": 0.7, "window": window}
    given |= {"softcap": 1.5, "sinks": sinks} if "sinks" in options else {}
    given |= {"slopes": torch.rand(H)} if "slopes" in options else {}
    real = lay.queries.document_ids > 0
    grads = []
    for compute in (sdpa.attend, by_loop):
        q, k, v = inputs(lay, requires_grad=True)
        sinks.grad = None
        compute(q, k, v, lay, **given)[real].square().sum().backward()
        grads.append([x.grad for x in ((q, k, v, sinks) if "sinks" in options else (q, k, v))])
    for ours, loop in zip(*grads, strict=True):
        assert loop.abs().max() > 1e-3
        torch.testing.assert_close(ours, loop, atol=1e-4, rtol=1e-4)


def test_long_rows_by_document_take_values_of_another_width(monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK", 4)
    lay = layout()
    lay.keys.branch_ids.zero_()  # branches take the mask
    for grad in (False, True):
        q, k, v = inputs(lay, grad)
        with torch.set_grad_enabled(grad):
            y = sdpa.attend(q, k, v, lay, scale=0.7)
        torch.testing.assert_close(y[0, :10], by_loop(q, k, v, lay, 0.7)[0, :10], atol=1e-5, rtol=1e-5)


def test_how_many_keys_a_window_leaves():
    for window in WINDOWS.values():
        for context in (1, 2, 5, 12):
            places = torch.arange(context)
            visible = [in_window(window, context - 1 - key, key) for key in places.tolist()]
            assert seen(window, context) == sum(visible), (window, context)
    assert seen(LocalGlobal(128, 128), 8192) == 128 + 63


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: StreamingSinks(-1, 4), "StreamingSinks.first must be at least 0, not -1"),
        (lambda: StreamingSinks(1, 0), "StreamingSinks.last must be at least 1"),
        (lambda: LocalGlobal(0, 4), "LocalGlobal.local"),
        (lambda: LocalGlobal(4, 0), "LocalGlobal.stride"),
        (lambda: LocalGlobal(4, 4, always=-1), "LocalGlobal.always"),
    ],
)
def test_windows_that_make_no_sense(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_a_backend_cannot_express_is_refused_by_name():
    lay = layout()
    q, k, v = inputs(lay)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sinks": torch.zeros(H)}, "sinks"),
        ({"window": LocalGlobal()}, "a sparse pattern"),
        ({"slopes": torch.zeros(1)}, "slopes"),
        ({}, "branches"),
    ]
    for given, what in refused:
        with pytest.raises(ValueError, match=f"'flash' does not take .*{what}"):
            flash.attend(q, k, v, lay, scale=1.0, **given)
    with pytest.raises(ValueError, match="'flash' does not take .*cache"):
        flash.attend(q[:, 10:], k, v, layout(10), scale=1.0)
    with pytest.raises(ValueError, match="'flex' has no backward pass on a CPU"):
        flex.attend(q.requires_grad_(), k, v, lay, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
def test_the_compiled_kernel_is_sdpa(window):
    """On CUDA, with gradients: soft cap, sinks, branches, grouped heads, a window or a pattern."""
    torch.manual_seed(0)
    rows = Places(*(x.cuda().repeat(1, 20) for x in vars(layout().keys).values()))
    rows.document_ids += 3 * torch.arange(20, device="cuda").repeat_interleave(12) * (rows.document_ids > 0)
    shapes = [(2, 240, H, 32), (2, 240, G, 32), (2, 240, G, 32)]
    sinks = nn.Parameter(torch.randn(H, device="cuda"))
    results = []
    for attend in (sdpa.attend, flex.attend):
        torch.manual_seed(1)
        q, k, v = (torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes)
        lay = Layout(rows, rows, rows.index[..., None].expand(-1, -1, 3))
        sinks.grad = None
        y = attend(q, k, v, lay, scale=0.3, window=WINDOWS[window], softcap=5.0, sinks=sinks)
        real = rows.document_ids > 0
        (y * torch.linspace(-1, 1, 32, device="cuda"))[real].sum().backward()
        results.append([y[real], q.grad, k.grad, v.grad, sinks.grad])
    # float32 through TF32-free kernels; the fused one keeps a running softmax, some 1e-6 off, summed over 240 keys
    for fused, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("window", [None, 40])
def test_a_documents_gradient_is_not_as_large_as_the_row(window) -> None:
    """Backward, a slice of the row would make zeros of the whole row for each document: 32 documents, 32 rows."""
    length, shares = 2048, 64
    index = (torch.arange(length) % shares)[None]
    places = Places(index, (torch.arange(length) // shares + 1)[None], torch.zeros_like(index))
    q, k, v = (torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3))
    out = sdpa.attend(q, k, v, Layout(places, places, index[..., None].expand(-1, -1, 3)), scale=1.0, window=window)
    with torch.profiler.profile(acc_events=True) as profile:
        out.sum().backward()
    filled = sum(event.count for event in profile.key_averages() if event.key == "aten::slice_backward")
    assert filled == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_short_rows_in_bfloat16_have_the_gradients_of_float32(autocast):
    """Within the 8 bits that inputs and results are rounded to: what lies between is float32, under autocast too."""
    torch.manual_seed(0)
    lay = layout()
    given = [torch.randn(2, 12, heads, width) for heads, width in ((H, D), (G, D), (G, E))]
    grad, found = torch.randn(2, 12, H, E), []
    for dtype in (torch.float32, torch.bfloat16):
        parts = [part.bfloat16().to(dtype).requires_grad_() for part in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            out = sdpa.attend(parts[0], parts[1], parts[2], lay, scale=D**-0.5)
        assert out.dtype == dtype
        out.backward(grad.bfloat16().to(dtype))
        found.append([out, *(part.grad for part in parts)])
    real = lay.queries.document_ids > 0
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded[real].float(), exact[real], rtol=2**-8, atol=2**-8)
