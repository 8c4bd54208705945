"""Attention over packed documents and windows in bfloat16, by every backend that can, against a dense mask.

    python benchmarks/gpu/packed_attention.py

One row of 16,384 positions, 32 heads of 128 and 8 key heads; forward, and forward and backward. Results and gradients
are compared with the dense mask's before anything is timed. A backend that refuses says why in a note.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from on_gpu import GpuBench
from torch import Tensor

from attention import dense, layout_of, with_backward, without
from mm.decoder.attention.backends import BACKENDS
from mm.decoder.layout import Layout, Places

GOALS: dict[str, tuple[float, float]] = {}  # none is set: the table is there to choose a backend by


def on(layout: Layout, device: torch.device) -> Layout:
    places = layout.queries
    moved = Places(places.index.to(device), places.document_ids.to(device), places.branch_ids.to(device))
    return Layout(moved, moved, layout.positions.to(device))


def by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    parts = [part.transpose(1, 2) for part in (q, k, v)]
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def ways(layout: Layout, inputs: list[Tensor], options: dict[str, Any], bench: GpuBench, what: str) -> dict[str, Any]:
    """Backends that take this call."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, attend in BACKENDS.items():
        call = partial(attend, *inputs, layout, scale=inputs[0].shape[-1] ** -0.5, **options)
        try:
            call()
        except ValueError as error:
            bench.note(f"{what}, {name}: {error}")
            continue
        found[name] = call
    return found


def compared(call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = call()
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def main(argv: Sequence[str] | None = None) -> int:
    bench = GpuBench(__doc__, argv)
    length, heads, groups, dim = (256, 4, 2, 16) if bench.tiny else (16_384, 32, 8, 128)
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "one document": (1, {}), "16 documents": (16, {}), "window 1024": (1, {"window": 64 if bench.tiny else 1024}),
    }  # fmt: skip
    for what, (documents, options) in cases.items():
        torch.manual_seed(0)
        sizes, dtype = (heads, groups, groups), torch.bfloat16
        inputs = [torch.randn(1, length, n, dim, device=bench.device, dtype=dtype, requires_grad=True) for n in sizes]
        grad = torch.randn(1, length, heads, dim, device=bench.device, dtype=dtype)
        layout = on(layout_of(length, documents), bench.device)
        masked = partial(by_mask, *inputs, dense(layout, options.get("window"), None))
        calls = ways(layout, inputs, options, bench, what)
        expected = compared(masked, inputs, grad)
        for call in calls.values():
            for found, wanted in zip(compared(call, inputs, grad), expected, strict=True):
                tolerance = 0.02 * float(wanted.abs().max())  # bfloat16 keeps 8 bits; other orders of sums
                torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
        calls["dense"] = masked
        both = bench.times({name: with_backward(call, inputs, grad) for name, call in calls.items()})
        forward = bench.times({name: without(call) for name, call in calls.items()})
        for kind, seconds in (("forward", forward), ("both", both)):
            for name in (name for name in calls if name != "dense"):
                taken, noise = seconds[name]
                bench.add(
                    what=f"{what}, {kind}", run=name, rate=length / taken, unit="tokens/s", noise=noise,
                    peer="a dense mask", ratio=seconds["dense"][0] / taken, judged="ratio",
                )  # fmt: skip
        bench.note_memory(what)
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
