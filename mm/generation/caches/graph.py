"""A decoding step as one CUDA graph: the GPU is told once what to do, not kernel by kernel in each step.

A graph reads and writes the same memory each time it runs, knows nothing of Python, and cannot wait for the host. The
static cache's step is made so: sizes and addresses change only where room is made or rows are left out, and then it is
captured anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm.decoder.cache import Cache

# Records what a function does to the GPU, without doing it: gives what does it, and the function's result.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def on_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
        result = function()
    return graph.replay, result


class StepGraph:
    """`step(ids, cache)` of a cache whose tensors stay where they are while `cache.index` is the same tensor."""

    def __init__(self, step: Callable[[Tensor, Cache], Tensor], capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._seen: Tensor | None = None  # the tensor that told the last run where things are
        self._replay: Callable[[], None] | None = None

    def __call__(self, ids: Tensor, cache: Cache, index: Tensor) -> Tensor:
        """ids (B,) -> logits (B, V), the caller's to keep."""
        if self._seen is not index:
            # The first run is a plain one: kernels are compiled and libraries take their memory, which no graph holds.
            self._seen, self._replay = index, None
            return self._step(ids, cache)
        assert cache.next_index is not None and cache.next_position is not None
        if self._replay is None:
            self._ids, self._next = ids.clone(), (cache.next_index.clone(), cache.next_position.clone())
            cache.next_index, cache.next_position = self._next
            self._replay, self._logits = self._capture(lambda: self._advance(cache))
        else:
            self._ids.copy_(ids)
            for mine, theirs in zip(self._next, (cache.next_index, cache.next_position), strict=True):
                if mine is not theirs:  # tokens were taken back
                    mine.copy_(theirs)
        cache.next_index, cache.next_position = self._next
        self._replay()
        return self._logits.clone()

    def _advance(self, cache: Cache) -> Tensor:
        """A step that ends by writing where the next one reads."""
        logits = self._step(self._ids, cache)
        assert cache.next_index is not None and cache.next_position is not None
        self._next[0].copy_(cache.next_index)
        self._next[1].copy_(cache.next_position)
        return logits
