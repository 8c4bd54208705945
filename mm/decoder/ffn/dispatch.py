"""How tokens reach their experts and come back: sorted by expert, none dropped, in one autograd node.

A dispatch says what the products of rows grouped by expert are; all else is the same for each. `slices` makes one
product an expert and asks the host how many rows each has; `grouped` makes one for all, and asks nothing.

Shape legend: `S` tokens, `K` experts each, `R` rows grouped by expert (at most S*K), `E` experts, `D` width, `F` expert
hidden width, `I` = 2F for gated experts, else F; a product's weight is (E, N, M): M numbers in, N out.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.decoder.ffn.activations import Activation
from mm.decoder.reused import empty

Dispatch = Literal["auto", "slices", "grouped"]
ALIGNED = 16  # bytes: what a row must be a multiple of for the GPU's grouped product


def check(how: Dispatch) -> None:
    """Raises ValueError for what is none of `Dispatch`."""
    if how not in get_args(Dispatch):
        raise ValueError(f"dispatch must be one of {', '.join(get_args(Dispatch))}, got {how!r}")


class Products(Protocol):
    """`places` (S*K,) sorted: each row's expert, E where it is sent to none; those rows come last and mean nothing."""

    rows: int  # how many rows there are buffers for

    def __init__(self, places: Tensor, experts: int) -> None: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (R, M) -> (R, N): each row with its own expert's weight."""
        ...

    def transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad (R, N) -> (R, M)."""
        ...

    def outer(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """grad (R, N), x (R, M) -> (E, N, M): the gradient of `weight`."""
        ...

    def sums(self, grad: Tensor, bias: Tensor) -> Tensor:
        """grad (R, N) -> (E, N): the gradient of `bias`."""
        ...

    def clear(self, x: Tensor) -> Tensor:
        """The same (R, ...), zero in rows that mean nothing."""
        ...


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
    products = Grouped if groups(how, x.device, x.dtype, first, down) else Slices
    return _Dispatch.apply(  # type: ignore[no-any-return]
        x, first, first_bias, down, down_bias, weights, indices, taken, activation, products
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


class Slices:
    """One product an expert, on its own contiguous rows: experts without a row cost nothing."""

    def __init__(self, places: Tensor, experts: int) -> None:
        ends = _ends(places, experts).tolist()
        self.rows = ends[-1]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.busy = [expert for expert, count in enumerate(counts) if count]
        self.idle = [expert for expert, count in enumerate(counts) if not count]
        self.counts = [counts[expert] for expert in self.busy]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = empty(x, len(x), weight.shape[1])
        for expert, given, made in zip(self.busy, x.split(self.counts), out.split(self.counts), strict=True):
            if bias is None:
                torch.mm(given, weight[expert].t(), out=made)
            else:
                torch.addmm(bias[expert], given, weight[expert].t(), out=made)
        return out

    def transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        out = empty(grad, len(grad), weight.shape[2])
        for expert, given, made in zip(self.busy, grad.split(self.counts), out.split(self.counts), strict=True):
            torch.mm(given, weight[expert], out=made)
        return out

    def outer(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        out = empty(grad, *weight.shape)
        for expert, left, right in zip(self.busy, grad.split(self.counts), x.split(self.counts), strict=True):
            torch.mm(left.t(), right, out=out[expert])
        return self._zero(out)

    def sums(self, grad: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty_like(bias)
        for expert, given in zip(self.busy, grad.split(self.counts), strict=True):
            torch.sum(given, 0, out=out[expert])
        return self._zero(out)

    def clear(self, x: Tensor) -> Tensor:
        return x

    def _zero(self, out: Tensor) -> Tensor:
        for expert in self.idle:
            out[expert].zero_()
        return out


class Grouped:
    """One product for all experts (torch's grouped_mm), which reads on the device how many rows each has."""

    def __init__(self, places: Tensor, experts: int) -> None:
        self.places, self.ends = places, _ends(places, experts).int()
        self.rows = len(places)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=self.ends)
        return out if bias is None else out + torch.cat([bias, bias.new_zeros(1, len(bias[0]))])[self.places]

    def transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(grad, weight, offs=self.ends)

    def outer(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(grad.t(), x, offs=self.ends)

    def sums(self, grad: Tensor, bias: Tensor) -> Tensor:
        out = bias.new_zeros(len(bias) + 1, *bias.shape[1:], dtype=torch.float32)
        return out.index_add_(0, self.places, grad.float())[:-1].to(bias.dtype)

    def clear(self, x: Tensor) -> Tensor:
        # Not in place: what recomputation keeps of a product must stay as it was.
        return x.masked_fill((self.places == len(self.ends)).unsqueeze(1), 0.0)


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
        products = kind(places, len(first))
        back = torch.empty_like(order)  # where each (token, choice) went
        back[order] = torch.arange(len(order), device=order.device)
        order = order[: products.rows]
        rows = _rows(x, order // chosen)
        before = products.linear(rows, first, first_bias)
        inner = empty(before, len(before), down.shape[2])
        activation.forward(before, inner)
        out = products.clear(products.linear(inner, down, down_bias))
        ctx.save_for_backward(rows, before, inner, out, first, first_bias, down, down_bias, weights, order, back)
        ctx.products, ctx.activation = products, activation
        return _sums(out, back.view(tokens, chosen), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, before, inner, out, first, first_bias, down, down_bias, weights, order, back = ctx.saved_tensors
        products, (tokens, chosen) = ctx.products, weights.shape
        wants_x, wants_first, wants_first_bias, wants_down, wants_down_bias = ctx.needs_input_grad[:5]
        grad_out = _rows(grad, order // chosen)
        grad_weights = weights.new_zeros(weights.numel())
        grad_weights[order] = torch.linalg.vecdot(out, grad_out)
        grad_out.mul_(weights.reshape(-1).index_select(0, order).unsqueeze(1))
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
            grad_x = _sums(per_row, back.view(tokens, chosen), None)
        return (
            grad_x, grad_first, grad_first_bias, grad_down, grad_down_bias, grad_weights.view_as(weights), *[None] * 4
        )  # fmt: skip


def _ends(places: Tensor, experts: int) -> Tensor:
    """places sorted -> (E,) where each expert's rows end."""
    return torch.searchsorted(places, torch.arange(experts, device=places.device), right=True)


def _sums(rows: Tensor, back: Tensor, weights: Tensor | None) -> Tensor:
    """rows (R, D), back and weights (S, K) -> (S, D): of each token the sum of its rows times their weights (None: 1);
    0 for what `back` points to past the last row."""
    if len(rows) < back.numel():  # not every choice has a row
        rows, back = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), back.clamp(max=len(rows))
    if rows.is_cpu:  # in one pass, summed in float32
        return F.embedding_bag(back, rows, mode="sum", per_sample_weights=weights)
    taken = rows.index_select(0, back.reshape(-1)).view(*back.shape, -1)
    return taken.sum(1) if weights is None else torch.bmm(weights.unsqueeze(1), taken).squeeze(1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.index_select(x, 0, index, out=empty(x, len(index), x.shape[1]))
