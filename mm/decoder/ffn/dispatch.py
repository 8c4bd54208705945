"""How tokens reach their experts and come back: sorted by expert, none dropped, in one autograd node.

A dispatch says what the products of rows grouped by expert are; all else is the same for each. `slices` makes one
product an expert and asks the host how many rows each has; `grouped` makes one for all, and asks nothing.

Shape legend: `S` tokens, `K` experts each, `R` rows grouped by expert, `E` experts, `D` width, `F` expert hidden width,
`I` = 2F for gated experts, else F.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.decoder.ffn.activations import Activation
from mm.decoder.ffn.products import Grouped, Products, Slices
from mm.decoder.reused import empty

Dispatch = Literal["auto", "slices", "grouped"]
ALIGNED = 16  # bytes: what a row must be a multiple of for the GPU's grouped product


def check(how: Dispatch) -> None:
    """Raises ValueError for what is none of `Dispatch`."""
    if how not in get_args(Dispatch):
        raise ValueError(f"dispatch must be one of {', '.join(get_args(Dispatch))}, got {how!r}")


def run(
    how: Dispatch,
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    taken: Tensor,
    activation: Activation,
) -> Tensor:
    """x (S, D), first (E, I, D) and down (E, D, F) with their biases, weights, indices and taken (S, K) -> (S, D).

    All but indices and taken in one dtype. Raises ValueError where `how` is grouped and cannot be.
    """
    kind = Grouped if groups(how, x.device, x.dtype, first, down) else Slices
    return _Dispatch.apply(  # type: ignore[no-any-return]
        x, first, first_bias, down, down_bias, weights, indices, taken, activation, kind
    )


def groups(how: Dispatch, device: torch.device, dtype: torch.dtype, *weights: Tensor) -> bool:
    """Whether products are grouped: where asked to, and by `auto` where the host would else wait for a GPU.

    Raises ValueError where `how` is grouped and torch's product does not take the widths.
    """
    if how == "slices" or (how == "auto" and not (device.type == "cuda" and dtype == torch.bfloat16)):
        return False
    whole = all(size * dtype.itemsize % ALIGNED == 0 for weight in weights for size in weight.shape[1:])
    if how == "auto":
        return whole and _on_the_device(device)
    if not whole:
        raise ValueError(
            f"dispatch='grouped' takes rows of whole {ALIGNED} bytes: in {dtype} the layer's width and the experts' "
            f"must be multiples of {ALIGNED // dtype.itemsize}; use slices"
        )
    return True


def _on_the_device(device: torch.device) -> bool:
    """Whether torch's grouped product runs there as one kernel; on older GPUs it asks the host, as slices do."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


class _Dispatch(torch.autograd.Function):
    """What the backward pass needs is kept once, grouped by expert, and its gradients are made in its place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        first_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        weights: Tensor,
        indices: Tensor,
        taken: Tensor,
        activation: Activation,
        kind: type[Products],
    ) -> Tensor:
        tokens, chosen = indices.shape
        places = torch.where(taken, indices, len(first)).reshape(-1)  # what is not taken goes past the last expert
        places, order = places.sort(stable=True)
        products = kind(places, first, down)
        order = order[: products.taken]
        back = torch.full_like(places, products.rows)  # where each (token, choice) went; past the last row if nowhere
        back[order] = torch.arange(len(order), device=order.device) if products.spots is None else products.spots
        rows = _grouped(x, order // chosen, products)
        before = products.linear(rows, first, first_bias)
        inner = empty(before, len(before), down.shape[2])
        activation.forward(before, inner)
        out = products.clear(products.linear(inner, down, down_bias))
        ctx.save_for_backward(rows, before, inner, out, first, first_bias, down, down_bias, weights, order, back)
        ctx.products, ctx.activation = products, activation
        return _sums(out, back.view(tokens, chosen), weights, products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, before, inner, out, first, first_bias, down, down_bias, weights, order, back = ctx.saved_tensors
        products, (tokens, chosen) = ctx.products, weights.shape
        wants_x, wants_first, wants_first_bias, wants_down, wants_down_bias = ctx.needs_input_grad[:5]
        grad_out = _grouped(grad, order // chosen, products)
        grad_weights, by_row = weights.new_zeros(weights.numel()), torch.linalg.vecdot(out, grad_out)
        grad_weights[order] = by_row if products.spots is None else by_row[products.spots]
        grad_out.mul_(_grouped(weights.reshape(-1, 1), order, products))
        # Frozen experts cost no product.
        grad_down = products.outer(grad_out, inner, down) if wants_down else None
        grad_down_bias = products.sums(grad_out, down_bias) if wants_down_bias else None
        grad_before = empty(before, *before.shape)
        ctx.activation.backward(before, products.transposed(grad_out, down), grad_before)
        grad_first = products.outer(grad_before, rows, first) if wants_first else None
        grad_first_bias = products.sums(grad_before, first_bias) if wants_first_bias else None
        grad_x = None
        if wants_x:
            per_row = products.clear(products.transposed(grad_before, first))
            grad_x = _sums(per_row, back.view(tokens, chosen), None, products)
        return (
            grad_x, grad_first, grad_first_bias, grad_down, grad_down_bias, grad_weights.view_as(weights), *[None] * 4
        )  # fmt: skip


def _sums(rows: Tensor, back: Tensor, weights: Tensor | None, products: Products) -> Tensor:
    """rows (R, D), back and weights (S, K) -> (S, D): of each token the sum of its rows times their weights (None: 1);
    0 for what `back` points to past the last row."""
    if products.taken < back.numel():  # not every choice has a row
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    if rows.is_cpu:  # in one pass, summed in float32
        return F.embedding_bag(back, rows, mode="sum", per_sample_weights=weights)
    taken = rows.index_select(0, back.reshape(-1)).view(*back.shape, -1)
    return taken.sum(1) if weights is None else torch.bmm(weights.unsqueeze(1), taken).squeeze(1)


def _grouped(x: Tensor, index: Tensor, products: Products) -> Tensor:
    """Row index[i] of x (S, D), as the i-th choice's row of (R, D); 0 in gaps."""
    if products.spots is None or products.gaps is None:
        return torch.index_select(x, 0, index, out=empty(x, len(index), x.shape[1]))
    where = index.new_zeros(products.rows).index_copy_(0, products.spots, index)
    out = torch.index_select(x, 0, where, out=empty(x, len(where), x.shape[1]))
    return out.index_fill_(0, products.gaps, 0.0)
