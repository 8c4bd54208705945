"""Which earlier keys a query attends to, beyond document and branch: a sliding window, or a sparse pattern.

A window is a number of places, or one of these patterns. All are causal: the layout hides later keys by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class StreamingSinks:
    """The `first` places of the document and the `last` ones up to the query (Xiao et al. 2023, arXiv 2309.17453).

    Positions stay the document's own; the paper's renumbering inside the cache is not done.
    """

    first: int = 4
    last: int = 1024

    def __post_init__(self) -> None:
        _positive("StreamingSinks.last", self.last)
        _positive("StreamingSinks.first", self.first, least=0)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Places (B, T, 1) and (B, 1, S) in the document -> (B, T, S) bool."""
        return (key < self.first) | (query - key < self.last)

    def seen(self, context: int) -> int:
        """How many of `context` keys, itself included, the last query sees."""
        return min(context, self.first + self.last)


@dataclass(frozen=True)
class LocalGlobal:
    """A local window and every `stride`-th place beyond it, in one head (Child et al. 2019, arXiv 1904.10509).

    `kind` "strided" counts the stride back from the query (places at distance stride, 2 * stride, ...); "fixed" takes
    the last place of each block of `stride` places of the document, the same for all queries. The first `always` places
    of a document are seen from everywhere (Longformer's global tokens, arXiv 2004.05150, made causal).
    """

    local: int = 128
    stride: int = 128
    kind: Literal["strided", "fixed"] = "fixed"
    always: int = 0

    def __post_init__(self) -> None:
        _positive("LocalGlobal.local", self.local)
        _positive("LocalGlobal.stride", self.stride)
        _positive("LocalGlobal.always", self.always, least=0)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Places (B, T, 1) and (B, 1, S) in the document -> (B, T, S) bool."""
        if self.kind == "strided":
            summary = (query - key) % self.stride == 0
        else:
            summary = key % self.stride == self.stride - 1
        seen = (query - key < self.local) | summary
        return seen | (key < self.always) if self.always else seen

    def seen(self, context: int) -> int:
        """How many of `context` keys, itself included, the last query sees."""
        query = context - 1
        beyond = range(max(0, context - self.local))  # keys too far for the local window
        if self.kind == "strided":
            summaries = [key for key in beyond if (query - key) % self.stride == 0]
        else:
            summaries = [key for key in beyond if key % self.stride == self.stride - 1]
        return min(context, self.local) + len(set(summaries) | set(beyond[: self.always]))


Window = int | StreamingSinks | LocalGlobal


def sees(window: Window, query: Tensor, key: Tensor) -> Tensor:
    """Places (B, T, 1) and (B, 1, S) in the document -> (B, T, S) bool, whatever kind of window it is."""
    return query - key < window if isinstance(window, int) else window.sees(query, key)


def seen(window: Window | None, context: int) -> int:
    """How many of `context` keys the last query sees through a window."""
    if window is None:
        return context
    return min(context, window) if isinstance(window, int) else window.seen(context)


def _positive(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
