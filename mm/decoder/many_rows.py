"""Float32 products of many rows on a CPU, by oneDNN where that is faster than the library torch sends them to.

torch sends float32 products to MKL, which keeps to AVX2 on processors that are not Intel's: 110 GFLOP/s on a core of
Zen 5, where oneDNN, which torch has beside it, takes AVX-512: 250 (benchmarks/many_rows.py). It goes there only where
oneDNN may round what it reads to bfloat16; on a processor without matrix units for bfloat16 oneDNN then computes in
float32 all the same. So a process asks once whether products stay exact and whether they are faster, and lets torch go
there for linear layers' products and the loss's, and for nothing else: what many small products of attention would lose
by it is more than what the large ones gain. Experts' rows, whose number is new in every step, are filled up to one of
few first (mm.decoder.ffn.products): compiling for each would take longer than what it saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications: oneDNN compiles for each new shape, which takes as long as what it saves of half as many.
LEAST = 1 << 25
LEAST_AGAIN = 1 << 22  # of a shape that comes again in every step: what they gain must outweigh what a call costs
SETTING: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] (torch makes it as it starts)
GAIN = 1.5  # times as fast, or the choice would hang on the noise of a moment


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N), torch's linear with all its gradients."""
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * weight.shape[0] >= LEAST
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and is_faster()
    )


@contextmanager
def onednn_if(x: Tensor, multiplications: int, least: int = LEAST) -> Iterator[None]:
    """While it lasts, torch's products with x's device and dtype go to oneDNN if each of them is of so many that they
    gain by it, `least`; as many as there are numbers in x times the other matrix's outer size."""
    if multiplications >= least and x.is_cpu and x.dtype == torch.float32 and is_faster():
        with onednn():
            yield
    else:
        yield


@contextmanager
def onednn() -> Iterator[None]:
    """Whatever the user has set is there again afterwards, and stays where it says more than torch's default."""
    before = SETTING.fp32_precision
    if before not in ("none", "ieee"):
        yield
        return
    SETTING.fp32_precision = "bf16"
    try:
        yield
    finally:
        SETTING.fp32_precision = before


@cache
def takes_bfloat16() -> bool:
    """Whether torch sends bfloat16 products to oneDNN by itself."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def is_faster() -> bool:
    """Whether oneDNN computes float32 products exactly and `GAIN` times as fast as torch by itself.

    Asked of one product of 512^3 on one thread, by its CPU time, so that the answer does not depend on what else the
    machine does: the best of five each, in some hundredths of a second.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            a, b = torch.linspace(-1, 1, 2 * 512 * 512).view(2, 512, 512).sin()
            exact = a.double() @ b.double()

            def product() -> Tensor:
                return a @ b

            with onednn():
                if not torch.allclose(product().double(), exact, atol=1e-3, rtol=0):  # in bfloat16 it is .4 off
                    return False
                quick = _seconds(product)
            return GAIN * quick < _seconds(product)
    finally:
        torch.set_num_threads(threads)


def _seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(6):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times[1:])


class _Linear(torch.autograd.Function):
    """F.linear, whose two products of the backward pass also go to oneDNN. Its gradient has gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with onednn():
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        with onednn():
            if ctx.needs_input_grad[0]:
                grad_x = (rows @ weight).view(x.shape)
            if ctx.needs_input_grad[1]:
                grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias
