"""Attention over packed documents, windows and slopes: `mm`'s backends against one call with a dense mask.

    OMP_NUM_THREADS=1 python benchmarks/attention.py --clock cpu [--length 4096]

One row, 8 heads of 64, float32; forward, and forward and backward. The dense mask is made beforehand and not timed,
which is in its favour. Results are compared before anything is timed. Flex compiles, and on a CPU has no backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import Bench
from torch import Tensor

from mm.decoder.attention.backends import flex, sdpa
from mm.decoder.layout import Layout, Places
from mm.decoder.positions import alibi_slopes

HEADS, DIM, DOCUMENTS, WINDOW = 8, 64, 8, 256


def layout_of(length: int, documents: int) -> Layout:
    share = length // documents
    index = (torch.arange(length) % share)[None]
    places = Places(index, (torch.arange(length) // share + 1)[None], torch.zeros_like(index))
    return Layout(places, places, index[..., None].expand(-1, -1, 3))


def dense(layout: Layout, window: int | None, slopes: Tensor | None) -> Tensor:
    mask = layout.mask(window)
    if slopes is None:
        return mask
    distance = layout.queries.index[:, :, None] - layout.keys.index[:, None]
    return (-slopes[:, None, None] * distance[:, None]).masked_fill(~mask, float("-inf"))


def by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    parts = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)


def by_backend(attend: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: dict[str, Any]) -> Tensor:
    if attend is sdpa.attend:  # what a pass makes once is made anew; Flex's blocks, like the dense mask, are not timed
        layout = Layout(layout.queries, layout.keys, layout.positions)
    return attend(q, k, v, layout, scale=DIM**-0.5, **options)


def with_backward(call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    def run() -> None:
        for part in inputs:
            part.grad = None
        call().backward(grad)

    return run


def without(call: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def main() -> int:
    bench = Bench(__doc__, lambda parser: _length(parser))
    length = bench.args.length
    slopes = alibi_slopes(HEADS)
    cases: dict[str, tuple[int, dict[str, Any], tuple[float, float] | None]] = {
        f"{DOCUMENTS} documents": (DOCUMENTS, {}, (6, 8)),
        f"window {WINDOW}": (1, {"window": WINDOW}, None),
        "ALiBi": (1, {"slopes": slopes}, None),
    }
    for name, (documents, options, goals) in cases.items():
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, length, HEADS, DIM, requires_grad=True) for _ in range(3))
        grad = torch.randn(1, length, HEADS, DIM)
        layout = layout_of(length, documents)
        mask = dense(layout, options.get("window"), options.get("slopes"))
        masked = partial(by_mask, q, k, v, mask)
        ours = partial(by_backend, sdpa.attend, q, k, v, layout, options)
        inputs = (part.detach() for part in (q, k, v))
        flexed = partial(by_backend, torch.compile(flex.attend, dynamic=False), *inputs, layout, options)
        with torch.no_grad():
            for found in (ours(), flexed()):
                torch.testing.assert_close(found, masked(), rtol=1e-4, atol=1e-5)
        forward = bench.times({"mm sdpa": without(ours), "mm flex": without(flexed), "dense": without(masked)})
        both = bench.times(
            {"mm sdpa": with_backward(ours, [q, k, v], grad), "dense": with_backward(masked, [q, k, v], grad)}
        )
        for what, seconds in ((f"{name}, T{length}, forward", forward), (f"{name}, T{length}, both", both)):
            floor, goal = goals if goals and seconds is both else (None, None)
            for run in (run for run in seconds if run != "dense"):
                bench.add(
                    what=what, run=run, rate=length / seconds[run][0], unit="tokens/s", noise=seconds[run][1],
                    peer="a dense mask", ratio=seconds["dense"][0] / seconds[run][0], judged="ratio", floor=floor,
                    goal=goal,
                )  # fmt: skip
    return bench.end()


def _length(parser: argparse.ArgumentParser) -> object:
    return parser.add_argument("--length", type=int, default=4096, metavar="T", help="positions (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
