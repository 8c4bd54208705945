"""Places for requests at work: so many for one client, so many in all. Belongs to the event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from mm.serve.limits import Refused, ServeLimits


class Places:
    """`with places.taken(client): ...`."""

    def __init__(self, limits: ServeLimits) -> None:
        self._limits = limits
        self._taken: Counter[str] = Counter()

    @property
    def used(self) -> int:
        return self._taken.total()

    @contextmanager
    def taken(self, client: str) -> Iterator[None]:
        """Raises Refused, too_many_requests or server_busy, where there is none."""
        if self._taken[client] >= self._limits.per_client:
            raise Refused("too_many_requests", f"{client} has {self._taken[client]} requests at work")
        if self.used >= self._limits.slots:
            raise Refused("server_busy", f"all {self._limits.slots} places are taken")
        self._taken[client] += 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]
