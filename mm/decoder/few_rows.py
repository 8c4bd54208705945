"""Matrix products with few rows, the work of decoding, on a CPU: torch's own are made for many (kernels/few_rows.cpp).

Shape legend: `M` rows, `N` outputs, `K` inputs, `E` matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder import kernels, many_rows

MOST_ROWS = 16  # with as many it is 1.1 to 2.1 times as fast as torch, by shape (benchmarks/few_rows.py)
DTYPES = (torch.float32, torch.bfloat16)


class Linear(nn.Linear):
    """torch's, with products of few rows by `few_rows`, of many by what is fastest for them."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N): torch's linear, or `few_rows` where that is made for it."""
    if not suits(x, weight):
        return many_rows.linear(x, weight, bias)
    y = few_rows(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., K) has few rows, on a CPU, in a dtype that `few_rows` takes, with no gradient and no autocast."""
    return (
        x.is_cpu
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def few_rows(x: Tensor, weight: Tensor, group: Tensor | None = None) -> Tensor:
    """x (M, K), weight (N, K) -> x W^T (M, N); or weight (E, N, K) and group (M,) int64, row m with W[group[m]], zero
    where group[m] is below 0.

    On a CPU, x and a contiguous weight both float32 or both bfloat16; sums in float32. A row's result does not depend,
    to the last bit, on which rows stand beside it.
    """
    return torch.ops.mm.few_rows(x, weight, group)


def _first(x: Tensor, weight: Tensor, group: Tensor | None = None) -> Tensor:
    """What the operator does until its kernel is there, which then stands before this; and where there can be none."""
    compute = torch.ops.mm.few_rows if x.is_cpu and kernels.available() else _with_torch
    return compute(x, weight, group)


def _with_torch(x: Tensor, weight: Tensor, group: Tensor | None) -> Tensor:
    if group is None:
        return F.linear(x, weight)
    y = x.new_zeros(len(x), weight.shape[-2])
    for row, matrix in enumerate(group.tolist()):
        if matrix >= 0:
            y[row] = weight[matrix] @ x[row]
    return y


kernels.library.define("few_rows(Tensor x, Tensor weight, Tensor? group) -> Tensor")
kernels.library.impl("few_rows", _first, "CompositeExplicitAutograd")


@torch.library.register_fake("mm::few_rows")
def _(x: Tensor, weight: Tensor, group: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-2])
