"""Products of rows grouped by expert: one an expert, or one for all.

Shape legend: `S` tokens, `K` experts each, `R` rows grouped by expert, `E` experts; a product's weight is (E, N, M): M
numbers in, N out.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder import many_rows
from mm.decoder.reused import empty

# For oneDNN an expert's rows are filled up to a multiple of ROWS at least, if there are LEAST_ROWS on average; of fewer
# too many would be empty, in bfloat16 for what it saves to compile for fewer numbers. In float32 it is faster if an
# expert's smaller product takes LEAST multiplications on average.
ROWS = 16
LEAST_ROWS = {torch.float32: 32, torch.bfloat16: 128}
LEAST = 1 << 21


class Products(Protocol):
    """Made of `places` (S*K,) sorted, each choice's expert, E where it is sent to none, and of the experts' weights."""

    rows: int  # how many there are buffers for
    taken: int  # how many choices, the first ones, have one
    spots: Tensor | None  # (taken,) which row each of those has; None: one after the other
    gaps: Tensor | None  # rows that are nobody's

    def __init__(self, places: Tensor, first: Tensor, down: Tensor) -> None: ...

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
        """The same (R, ...), zero in rows that mean nothing and that somebody reads."""
        ...


class Slices:
    """One product an expert, on its own contiguous rows: experts without a row cost nothing.

    Where oneDNN makes the products the rows of an expert are filled up to one of few numbers: it compiles for each
    number of rows that it has not seen, and that would be a new one in every step.
    """

    def __init__(self, places: Tensor, first: Tensor, down: Tensor) -> None:
        ends = _ends(places, len(first)).tolist()
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.busy = [expert for expert, count in enumerate(counts) if count]
        self.idle = [expert for expert, count in enumerate(counts) if not count]
        self.counts = [counts[expert] for expert in self.busy]
        self.rows = self.taken = ends[-1]
        self.spots: Tensor | None = None
        self.gaps: Tensor | None = None
        fills_up, quickly = self._by_onednn(first, down)
        self.products = many_rows.onednn if quickly else nullcontext
        if fills_up:
            self._fill_up()

    def _by_onednn(self, first: Tensor, down: Tensor) -> tuple[bool, bool]:
        """Whether oneDNN is to make the products, and whether it has to be asked to."""
        each = self.taken / max(1, len(self.busy))
        if not first.is_cpu or each < LEAST_ROWS.get(first.dtype, each + 1):
            return False, False
        if first.dtype == torch.bfloat16:
            return many_rows.takes_bfloat16(), False
        faster = each * min(first[0].numel(), down[0].numel()) >= LEAST and many_rows.is_faster()
        return faster, faster

    def _fill_up(self) -> None:
        counts, self.counts = self.counts, [_room(count) for count in self.counts]
        self.rows = sum(self.counts)
        real, room = (torch.tensor(numbers, dtype=torch.long) for numbers in (counts, self.counts))
        shift = ((room - real).cumsum(0) - (room - real)).repeat_interleave(real)
        self.spots = torch.arange(self.taken) + shift
        self.gaps = torch.ones(self.rows, dtype=torch.bool).index_fill_(0, self.spots, False).nonzero()[:, 0]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = empty(x, len(x), weight.shape[1])
        with self.products():
            for expert, given, made in zip(self.busy, x.split(self.counts), out.split(self.counts), strict=True):
                if bias is None:
                    torch.mm(given, weight[expert].t(), out=made)
                else:
                    torch.addmm(bias[expert], given, weight[expert].t(), out=made)
        return out

    def transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        out = empty(grad, len(grad), weight.shape[2])
        with self.products():
            for expert, given, made in zip(self.busy, grad.split(self.counts), out.split(self.counts), strict=True):
                torch.mm(given, weight[expert], out=made)
        return out

    def outer(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        out = empty(grad, *weight.shape)
        with self.products():
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

    spots = gaps = None

    def __init__(self, places: Tensor, first: Tensor, down: Tensor) -> None:
        self.places, self.ends = places, _ends(places, len(first)).int()
        self.rows = self.taken = len(places)

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


def _ends(places: Tensor, experts: int) -> Tensor:
    """places sorted -> (E,) where each expert's rows end."""
    return torch.searchsorted(places, torch.arange(experts, device=places.device), right=True)


def _room(count: int) -> int:
    """The next multiple of ROWS, or of the sixteenth of a power of two where that is more: few numbers."""
    step = max(ROWS, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step
