"""A benchmark and a "model" small enough to know every number by heart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.records import Response
from mm.types import Media, Sample

COLORS = ("red", "green", "blue", "white")


def picture(color: str) -> Media:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return Media("image", buffer.getvalue(), f"{color}.png")


class ColorBenchmark(Benchmark):
    """`n` questions "what color?", each about one of four pictures, and one about nothing; `distinct` ones differ."""

    name = "colors"
    max_new_tokens = 3

    def __init__(self, n: int = 12, distinct: bool = False) -> None:
        self.n = n
        self.distinct = distinct

    def samples(self) -> list[Sample]:
        samples = []
        for i in range(self.n):
            color = COLORS[i % len(COLORS)]
            content: Any = [
                {"type": "image", "media": 0},
                {"type": "text", "text": "what color?" + "?" * (i * self.distinct)},
            ]
            meta = {"question": "what color?", "answers": [color], "category": "color"}
            samples.append(Sample(f"q{i}", [{"role": "user", "content": content}], [picture(color)], [], meta))
        meta = {"question": "yes?", "answers": ["yes"], "category": "yes/no"}
        return [*samples, Sample("plain", [{"role": "user", "content": "yes?"}], [], [], meta)]


class Seer:
    """Stands in for `respond`: says the color of the picture, "red" without one, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Sample] = []
        self.batch_sizes: list[tuple[int, int]] = []

    def __call__(self, model: Any, benchmark: Benchmark, samples: Sequence[Sample], batch_size: int) -> list[Response]:
        self.asked += samples
        self.batch_sizes.append((len(samples), batch_size))
        return [Response(self._answer(sample), confidence=0.75) for sample in samples]

    def _answer(self, sample: Sample) -> str:
        if sample.messages[-1]["content"] == "yes?":
            return "yes"
        return sample.media[0].name.removesuffix(".png") if sample.media else "red"
