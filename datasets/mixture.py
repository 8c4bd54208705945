"""Which sample stands at place g of a weighted, shuffled, endless stream: a pure function of (seed, g).

    g -> data set, place in it -> epoch, index -> Draw

Nothing is iterated and nothing is remembered, so a stream can be entered anywhere, by any worker, at no cost.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

from mm.datasets.order import Order, order


@dataclass(frozen=True)
class Draw:
    """Sample `index` of data set `name`, in that set's own epoch `epoch`."""

    name: str
    epoch: int
    index: int


class Mixture:
    """Data sets of the given sizes, mixed by weight.

    Of any first g samples of the stream, the share of a data set is its weight's to within a few samples, and exact at
    every multiple of the least common period of the weights; a low-discrepancy sequence, not a draw by chance. Each set
    runs through its own epochs, each a permutation by (seed, name, epoch), at the pace that its weight gives.

    Weights default to the sizes: every sample is then seen once in `len(mixture)` samples. `block` consecutive places,
    from a multiple of it on, go to one set: whole batches of one kind.
    """

    def __init__(
        self, sizes: dict[str, int], weights: dict[str, float | None] | None = None, seed: int = 0, block: int = 1
    ) -> None:
        if not sizes:
            raise ValueError("a mixture needs at least one data set")
        self.block = block
        self.sizes = dict(sizes)
        self.seed = seed
        given = weights or {}
        self.weights: dict[str, Fraction] = {}
        self._orders: dict[str, tuple[int, Order]] = {}  # the last epoch's of each set: a shortcut, not a state
        for name, size in self.sizes.items():
            weight = given.get(name)
            if size < 1:
                raise ValueError(f"data set {name} is empty")
            if weight is not None and not weight > 0:
                raise ValueError(f"data set {name}: weight {weight} must be above 0; leave the set out instead")
            self.weights[name] = Fraction(size) if weight is None else Fraction(str(weight))
        left = sum(self.weights.values(), Fraction(0))
        self._shares: list[tuple[str, int, int]] = []  # of what the sets before leave: numerator, denominator
        for name, weight in self.weights.items():
            self._shares.append((name, (weight / left).numerator, (weight / left).denominator))
            left -= weight

    def __len__(self) -> int:
        """Samples in all sets together."""
        return sum(self.sizes.values())

    def __getitem__(self, place: int) -> Draw:
        number, inside = divmod(place, self.block)
        name, before = self.locate(number)
        place = before * self.block + inside
        epoch, within = divmod(place, self.sizes[name])
        cached, permutation = self._orders.get(name, (None, None))
        if permutation is None or cached != epoch:
            permutation = order(subseed(self.seed, name), epoch, self.sizes[name])
            self._orders[name] = (epoch, permutation)
        return Draw(name, epoch, permutation[within])

    def locate(self, place: int) -> tuple[str, int]:
        """The data set of block `place` of the stream, and how many blocks of that set came before.

        Each set in turn takes its share w of the places that the sets before it left: it has floor(w * p) of the first
        p, so it takes place p where floor(w * (p + 1)) is larger. Rational arithmetic: exact however long the run.
        """
        for name, numerator, denominator in self._shares:
            taken = place * numerator // denominator
            if (place + 1) * numerator // denominator > taken:
                return name, taken
            place -= taken
        raise AssertionError("the last data set takes every place that is left")


def subseed(*parts: object) -> int:
    """A 63-bit seed from anything with a faithful str(): independent of process, platform and Python's hash seed."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
