"""Which sample stands at place g of a weighted, shuffled, endless stream: a pure function of (seed, g).

    g -> data set, place in it -> epoch, index -> Draw

Nothing is iterated and nothing is remembered, so a stream can be entered anywhere, by any worker, at no cost.
"""

from __future__ import annotations

import hashlib
import math
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

    Args:
        sizes: samples of each set.
        weights: of each set (None: its size). Every sample is then seen once in `len(mixture)` samples.
        epochs: how often each set is read while the mixture is read once (None: once), instead of weights: a set then
            weighs epochs * size, and `len(mixture)` is the sum of those. 0.25 reads a quarter, another one each time.
        temperature: weights become weight ** (1 / temperature), rounded to a millionth of the largest; large values
            even out the sets (2 is between, as multilingual corpora are mixed: arXiv 1907.05019).
        block: this many consecutive places, from a multiple of it on, go to one set: whole batches of one kind.
        read_blocks: consecutive samples of each set that are best read together (see `order`).

    Raises ValueError, naming the set, for an empty one and for weights, epochs or a temperature that mean nothing.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        weights: dict[str, float | None] | None = None,
        seed: int = 0,
        block: int = 1,
        *,
        epochs: dict[str, float | None] | None = None,
        temperature: float = 1.0,
        read_blocks: dict[str, int] | None = None,
    ) -> None:
        if not sizes:
            raise ValueError("a mixture needs at least one data set")
        self.block = block
        self.sizes = dict(sizes)
        self.seed = seed
        self.read_blocks = read_blocks or {}
        self.epochs = {name: _fraction((epochs or {}).get(name), 1, f"data set {name}: epochs") for name in sizes}
        self.weights = _weights(self.sizes, weights or {}, epochs or {}, self.epochs, temperature)
        self._orders: dict[str, tuple[int, Order]] = {}  # the last epoch's of each set: a shortcut, not a state
        left = sum(self.weights.values(), Fraction(0))
        self._shares: list[tuple[str, int, int]] = []  # of what the sets before leave: numerator, denominator
        for name, weight in self.weights.items():
            self._shares.append((name, (weight / left).numerator, (weight / left).denominator))
            left -= weight

    def __len__(self) -> int:
        """Samples in all sets together, each as often as its epochs say."""
        return max(1, round(sum(self.sizes[name] * self.epochs[name] for name in self.sizes)))

    def __getitem__(self, place: int) -> Draw:
        number, inside = divmod(place, self.block)
        name, before = self.locate(number)
        place = before * self.block + inside
        epoch, within = divmod(place, self.sizes[name])
        cached, permutation = self._orders.get(name, (None, None))
        if permutation is None or cached != epoch:
            together = self.read_blocks.get(name, 1000)
            permutation = order(subseed(self.seed, name), epoch, self.sizes[name], together)
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


def _weights(
    sizes: dict[str, int],
    weights: dict[str, float | None],
    epochs: dict[str, float | None],
    times: dict[str, Fraction],
    temperature: float,
) -> dict[str, Fraction]:
    """Exact, so that the stream is the same however far it is read and wherever it is entered."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature:g}: must be a number above 0")
    result = {}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"data set {name} is empty")
        if weights.get(name) is not None and any(given is not None for given in epochs.values()):
            raise ValueError(f"data set {name}: weight: another set has epochs; give all sets either weights or epochs")
        result[name] = _fraction(weights.get(name), size * times[name], f"data set {name}: weight")
    if temperature == 1:
        return result
    if any(given is not None for given in epochs.values()):
        raise ValueError(f"temperature={temperature:g}: epochs fix the shares already; leave one of the two out")
    largest = max(result.values())
    # In millionths: powers are irrational, and their last bits are not the same on every machine.
    flat = {name: round(float(weight / largest) ** (1 / temperature) * 1e6) for name, weight in result.items()}
    return {name: Fraction(max(1, millionths)) for name, millionths in flat.items()}


def _fraction(value: float | None, default: Fraction | int, what: str) -> Fraction:
    if value is None:
        return Fraction(default)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{what} {value:g} must be a number above 0; leave the set out instead")
    return Fraction(str(value))


def subseed(*parts: object) -> int:
    """A 63-bit seed from anything with a faithful str(): independent of process, platform and Python's hash seed."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
