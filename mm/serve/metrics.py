"""What `/metrics` says, in Prometheus' form. Labels have few values, whatever clients send."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from mm.generation.batching import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """`engine` gives the engine of the moment, `places` how many places are taken."""

    def __init__(self, engine: Callable[[], Engine], places: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineCollector(engine, places))
        self._requests = Counter("mm_requests", "Requests by route and status", ["route", "status"], registry=registry)
        self._refused = Counter("mm_refused", "Refused requests by code", ["code"], registry=registry)
        self._seconds = Histogram(
            "mm_request_seconds", "Seconds of a request", ["route"], buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "mm_first_token_seconds", "Seconds from a whole request to its first token", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip

    def request_ended(self, scope: Scope, status: int, seconds: float) -> None:
        """`status` is 0 for a request that was never answered."""
        route = getattr(scope.get("route"), "path", "other")
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Callable[[], Engine], places: Callable[[], int]) -> None:
        self._engine, self._places = engine, places

    def collect(self) -> Iterable[Metric]:
        engine = self._engine()
        counts, pages = engine.counts, engine.pages
        for name, text, value in (
            ("mm_prompt_positions", "Positions read of prompts", counts.prefilled),
            ("mm_shared_positions", "Positions of prompts found in the cache", counts.shared),
            ("mm_tokens", "Tokens of answers", counts.decoded),
            ("mm_engine_steps", "Decoding steps", counts.steps),
            ("mm_media_encoded", "Media that were encoded", counts.encoded),
            ("mm_media_remembered", "Media whose features were kept from before", counts.remembered),
        ):
            yield CounterMetricFamily(name, text, value)
        for name, text, value in (
            ("mm_requests_running", "Requests being read or written", len(engine.running)),
            ("mm_requests_waiting", "Requests that wait for pages", len(engine.waiting)),
            ("mm_places_taken", "Places taken", self._places()),
            ("mm_pages_used", "Pages of the cache in use", pages.used),
            ("mm_pages", "Pages of the cache", pages.count),
        ):
            yield GaugeMetricFamily(name, text, value)
