"""The order of samples in an epoch: a function of (seed, epoch, place), so that no process holds a list of all samples.

    place -> window of blocks -> place within the window -> block and offset -> sample

Samples are read with locality: the epoch goes through `window` blocks of `block` consecutive samples at a time (blocks
drawn from everywhere, about a shard each), mixed among themselves. Both levels are Feistel permutations with cycle
walking (Black & Rogaway, 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

MASK = (1 << 64) - 1
ROUNDS = 6  # four make a strong pseudo-random permutation of large halves; halves of a few bits want some more


def order(seed: int, epoch: int, n: int, block: int = 1000, window: int = 16) -> Order:
    """The permutation of range(n) that an epoch reads. See `Order`."""
    return Order(seed, epoch, n, block, window)


class Permutation:
    """A seeded bijection of range(n) in O(1) memory; `p[i]` takes microseconds, `p.place(p[i]) == i`."""

    def __init__(self, seed: int, n: int) -> None:
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits
        self.keys = [_mix(seed + 0x9E3779B97F4A7C15 * (number + 1)) for number in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        return self._walk(index, self.keys)

    def place(self, value: int) -> int:
        """The index at which `value` stands."""
        low = (1 << self.half) - 1
        swap = lambda x: (x & low) << self.half | x >> self.half  # noqa: E731  (a Feistel network's inverse)
        walked = swap(self._rounds(swap(value), self.keys[::-1]))
        while walked >= self.n:
            walked = swap(self._rounds(swap(walked), self.keys[::-1]))
        return walked

    def table(self) -> np.ndarray:
        """(n,) int64: all of it at once, a hundred times as fast as one by one."""
        values = self._rounds_of(np.arange(self.n, dtype=np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = self._rounds_of(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _rounds_of(self, values: np.ndarray) -> np.ndarray:
        half, low = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = values >> half, values & low
        for key in self.keys:
            left, right = right, left ^ (_mix_of(right ^ np.uint64(key)) & low)
        return left << half | right

    def _walk(self, value: int, keys: list[int]) -> int:
        value = self._rounds(value, keys)
        while value >= self.n:  # fewer than four steps on average: the domain is less than 4 n
            value = self._rounds(value, keys)
        return value

    def _rounds(self, value: int, keys: list[int]) -> int:
        low = (1 << self.half) - 1
        left, right = value >> self.half, value & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        return left << self.half | right


class Order(Sequence[int]):
    """A permutation of range(n), fixed by (seed, epoch, n, block, window).

    Args:
        block: consecutive samples that stay in one window; give the shard's size.
        window: blocks mixed together. More mixes better and keeps more shards open.

    Raises:
        ValueError: n negative, or block or window less than 1.
    """

    def __init__(self, seed: int, epoch: int, n: int, block: int = 1000, window: int = 16) -> None:
        if n < 0 or block < 1 or window < 1:
            raise ValueError(f"order needs n >= 0, block >= 1 and window >= 1, got {n}, {block} and {window}")
        self.n, self.block, self.window = n, block, window
        self.seed = _mix(_mix(seed & MASK) + (epoch & MASK))
        self.total = -(-n // block)
        self.missing = self.total * block - n  # samples that the last block lacks
        self.blocks = Permutation(self.seed, self.total)
        self._last: tuple[int, list[int], np.ndarray] | None = None
        # The window that holds the short last block is short itself; those after it start earlier.
        self.short = self.blocks.place(self.total - 1) // window if n else 0

    def __len__(self) -> int:
        return self.n

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.n))]
        if not -self.n <= index < self.n:
            raise IndexError(f"place {index} of {self.n} samples")
        index %= self.n
        span = self.window * self.block
        window = index // span
        if window > self.short or index >= (self.short + 1) * span - self.missing:
            window = (index + self.missing) // span
        start = window * span - (self.missing if window > self.short else 0)
        blocks, mixed = self._window(window)
        place = int(mixed[index - start])
        return blocks[place // self.block] * self.block + place % self.block

    def _window(self, number: int) -> tuple[list[int], np.ndarray]:
        """The blocks of a window and the permutation of its samples; the last one asked for is kept."""
        if self._last is None or self._last[0] != number:
            first = number * self.window
            blocks = [self.blocks[place] for place in range(first, min(first + self.window, self.total))]
            size = len(blocks) * self.block
            if number == self.short:
                blocks.sort(key=lambda block: block == self.total - 1)  # the short block last: offsets are then dense
                size -= self.missing
            self._last = (number, blocks, Permutation(_mix(self.seed + number + 1), size).table())
        return self._last[1], self._last[2]

    def __iter__(self) -> Iterator[int]:
        return (self[place] for place in range(self.n))


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood, 2014): 64 bits in, 64 well-mixed bits out."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def _mix_of(values: np.ndarray) -> np.ndarray:
    """`_mix` of each uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
