"""Memory for big tensors on a CPU, used again: a fresh block costs a page fault for each of its pages.

The C library gives a big block back to the system when it is freed, and what a training step allocates anew each time
(the gradients of all experts, say) is then bound by page faults. Here a block goes back to a pool when the last tensor
on it is gone, as CUDA's allocator does it.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST = 4 << 20  # bytes; the C library keeps smaller blocks itself
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14


class Pool:
    """Blocks by size, at most `most` bytes of them idle; those of a size longest not given back go first.

    Sizes are rounded up by an eighth at most: the rows of one step are not quite as many as those of the next.

    A block comes back from any thread and in the middle of anything, wherever its last tensor goes: so nothing here is
    counted, and each step is one that no other can interrupt.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._blocks: dict[int, list[np.ndarray]] = {}

    @property
    def idle(self) -> int:
        """Bytes that wait to be used again."""
        return sum(size * len(blocks) for size, blocks in list(self._blocks.items()))

    def take(self, size: int) -> Tensor:
        """(size,) uint8, not set to anything."""
        room = _room(size)
        block = _pop(self._blocks.get(room))
        if block is None:
            block = _fresh(room)
        lease = block[:size]  # the tensor keeps this view alive, and nobody else does
        weakref.finalize(lease, self._back, block).atexit = False
        return torch.from_numpy(lease)

    def _back(self, block: np.ndarray) -> None:
        blocks = self._blocks.pop(block.nbytes, [])  # so that the size stands last
        self._blocks[block.nbytes] = [*blocks, block]
        while self.idle > self.most and (size := next(iter(list(self._blocks)), None)) is not None:
            if _pop(self._blocks.get(size)) is None:
                self._blocks.pop(size, None)


def _room(size: int) -> int:
    """The next of eight even steps from one power of two to the next."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def _pop(blocks: list[np.ndarray] | None) -> np.ndarray | None:
    try:
        return blocks.pop() if blocks else None
    except IndexError:  # another thread took the last one meanwhile
        return None


POOL = Pool(2 << 30)


def empty(like: Tensor, *size: int) -> Tensor:
    """torch.empty of that size, contiguous, in the dtype and on the device of `like`.

    In inference mode it is torch's own: a server should give back what a long prompt took.
    """
    bytes_ = like.element_size() * int(np.prod(size))
    known = like.is_cpu and type(like) in (Tensor, torch.nn.Parameter)
    if bytes_ < LEAST or not known or torch.is_inference_mode_enabled():
        return like.new_empty(size)
    return POOL.take(bytes_).view(like.dtype).view(size)


def _fresh(size: int) -> np.ndarray:
    """In huge pages where Linux gives them on request: one fault each, not 512."""
    block = np.empty(size, np.uint8)
    if advise := _madvise():
        start = -(-block.ctypes.data // _HUGE_PAGE) * _HUGE_PAGE
        end = (block.ctypes.data + size) // _HUGE_PAGE * _HUGE_PAGE
        if start < end:
            advise(start, end - start, _MADV_HUGEPAGE)  # where it is refused, pages stay small
    return block


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
