"""Needles in haystacks: one fact, or one picture, in a long context (after RULER, Hsieh et al. 2024). Generated.

Lengths are in words and pictures, not tokens: the same questions for every tokenizer.
"""

from __future__ import annotations

import io
import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from mm.evaluation.benchmarks.base import Benchmark, by_category, mean_of
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers import needle
from mm.evaluation.statistics import Mean
from mm.types import Media, Sample

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEYS = (
    "apple",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "lemon",
)
COLORS = {
    "red": "#d32f2f",
    "green": "#2e7d32",
    "blue": "#1565c0",
    "yellow": "#fbc02d",
    "black": "#000000",
    "white": "#ffffff",
}


class NeedleBenchmark(Benchmark):
    """`per_cell` contexts of every length and depth (0 is the beginning, 1 the end), each with its own needles."""

    def __init__(
        self,
        lengths: Sequence[int],
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        per_cell: int = 5,
        seed: int = 0,
    ) -> None:
        if (
            not lengths
            or min(lengths) < 1
            or not depths
            or not all(0 <= depth <= 1 for depth in depths)
            or per_cell < 1
        ):
            raise ValueError(f"{self.name}: lengths {list(lengths)}, depths {list(depths)}, per_cell={per_cell}: want "
                             "lengths and per_cell from 1 up and depths in [0, 1]")  # fmt: skip
        self.lengths = list(lengths)
        self.depths = list(depths)
        self.per_cell = per_cell
        self.seed = seed

    @abstractmethod
    def hide(self, key: str, length: int, depth: float, rng: random.Random) -> Sample:
        """One context with its question."""

    def samples(self) -> list[Sample]:
        samples = []
        for length in self.lengths:
            for depth in self.depths:
                for number in range(self.per_cell):
                    key = f"{length}_{depth:g}_{number}"
                    rng = random.Random(f"{self.name}:{self.seed}:{key}")
                    sample = self.hide(key, length, depth, rng)
                    sample.meta.update(generated=True, depth=depth, category=f"{length}")
                    samples.append(sample)
        return samples

    def origin(self) -> str:
        return f"generated haystacks, seed {self.seed}"

    def score(self, sample: Sample, prediction: str) -> float:
        return needle.score(prediction, sample.meta["answers"])

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        return [
            Mark(self.score(sample, response.text), details={"depth": sample.meta["depth"]})
            for sample, response in zip(samples, responses, strict=True)
        ]

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """Overall, then by length and by depth."""
        depths = sorted({record.details["depth"] for record in records if "depth" in record.details})
        by_depth = {
            f"depth_{depth:g}_accuracy": mean_of([r for r in records if r.details.get("depth") == depth])
            for depth in depths
        }
        by_length = {f"length_{name}": mean for name, mean in by_category(records).items()}
        ordered = sorted(by_length, key=lambda name: int(name.split("_")[1]))
        return {"accuracy": mean_of(records), **{name: by_length[name] for name in ordered}, **by_depth}


class TextNeedleBenchmark(NeedleBenchmark):
    """Numbers hidden in repeated sentences; `needles` of them about one thing are asked for, among `distractors` about
    other things. The score is the share of the needles that the answer holds."""

    name = "needle"
    guessable = False
    max_new_tokens = 64

    def __init__(
        self,
        lengths: Sequence[int] = (250, 500, 1000, 2000),
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        per_cell: int = 5,
        needles: int = 1,
        distractors: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, depths, per_cell, seed)
        if not 1 <= needles <= 20 or not 0 <= distractors < len(KEYS):
            raise ValueError(
                f"needle: needles={needles}, distractors={distractors}: want 1 to 20, 0 to {len(KEYS) - 1}"
            )
        self.needles = needles
        self.distractors = distractors

    def hide(self, key: str, length: int, depth: float, rng: random.Random) -> Sample:
        words = (NOISE.split() * (1 + length // len(NOISE.split())))[:length]
        sentences: list[str] = [*" ".join(words).split(". ")]
        about, *others = rng.sample(KEYS, 1 + self.distractors)
        values = [str(rng.randrange(10**6, 10**7)) for _ in range(self.needles)]
        for other in others:
            sentences.insert(rng.randrange(len(sentences) + 1), _fact(other, str(rng.randrange(10**6, 10**7))))
        for place in range(self.needles):  # the first at its depth, further ones spread behind and before it
            shifted = (depth + place / self.needles) % 1.0 if place else depth
            sentences.insert(round(shifted * len(sentences)), _fact(about, values[place]))
        plural = "are all the special magic numbers" if self.needles > 1 else "is the special magic number"
        asked = f"What {plural} for {about} mentioned in the text?"
        content = f"Remember the numbers in this text.\n{'. '.join(sentences)}.\n{asked}"
        meta = {"question": asked, "answers": values}
        return Sample(key, [{"role": "user", "content": content}], meta=meta)


class ImageNeedleBenchmark(NeedleBenchmark):
    """One coloured disc among pictures of grey noise; lengths count pictures. Any colour may come: chance is 1 / 6."""

    name = "needle_image"
    max_new_tokens = 8

    def __init__(
        self,
        lengths: Sequence[int] = (4, 16, 64),
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        per_cell: int = 5,
        size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, depths, per_cell, seed)
        if size < 8:
            raise ValueError(f"needle_image: size={size}: pictures have at least 8 pixels a side")
        self.size = size

    def hide(self, key: str, length: int, depth: float, rng: random.Random) -> Sample:
        color = rng.choice(list(COLORS))
        place = round(depth * (length - 1))
        media = [self._picture(rng, COLORS[color] if index == place else None, index) for index in range(length)]
        asked = "One picture shows a disc. What color is the disc?"
        parts: list[dict[str, Any]] = [{"type": "image", "media": index} for index in range(length)]
        content = [*parts, {"type": "text", "text": asked}]
        meta = {"question": asked, "answers": [color], "choices": list(COLORS)}
        return Sample(key, [{"role": "user", "content": content}], media, meta=meta)

    def _picture(self, rng: random.Random, color: str | None, index: int) -> Media:
        small = Image.frombytes("L", (8, 8), bytes(rng.randrange(96, 160) for _ in range(64)))
        picture = small.resize((self.size, self.size), Image.Resampling.NEAREST).convert("RGB")
        if color is not None:
            margin = self.size // 5
            ImageDraw.Draw(picture).ellipse((margin, margin, self.size - margin, self.size - margin), fill=color)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return Media("image", buffer.getvalue(), f"{index:04d}.png")


def _fact(about: str, value: str) -> str:
    return f"One of the special magic numbers for {about} is: {value}"
