"""What a decoding run keeps of the past: everything, or less of it by a rule. `make` knows them by name."""

from mm.generation.caches.choose import CACHES, make
from mm.generation.caches.evicting import EvictingCache
from mm.generation.caches.quantised import QuantisedCache
from mm.generation.caches.windowed import WindowedCache

__all__ = ["CACHES", "EvictingCache", "QuantisedCache", "WindowedCache", "make"]
