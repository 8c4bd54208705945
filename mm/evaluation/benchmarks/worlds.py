"""The generated audio and video worlds, on clips of the held-out test stream: exact answers, balanced by construction.

The data is generated, so a score here shows that a modality is read at all, not how well it is read elsewhere.
"""

from __future__ import annotations

from itertools import chain

from mm.datasets.sources.world_audio import AudioWorld
from mm.datasets.sources.world_video import VideoWorld
from mm.datasets.worlds import Split, World
from mm.evaluation.benchmarks.base import Benchmark, questions_of, split_branches
from mm.types import Sample


class WorldBenchmark(Benchmark):
    """Five questions a clip (four open ones, one yes/no) about `n` clips."""

    max_new_tokens = 8  # every answer is one word: a few tokens in any vocabulary
    world: type[World]

    def __init__(self, n: int = 200, split: Split = "test", seed: int = 0) -> None:
        self.n = n
        self.split: Split = split
        self.seed = seed

    def samples(self) -> list[Sample]:
        clips = self.world(n=self.n, split=self.split, seed=self.seed)  # with branches: each clip is rendered once
        return questions_of(chain.from_iterable(map(split_branches, clips)))

    def origin(self) -> str:
        return f"generated {self.world.kind} world, {self.split} stream of seed {self.seed}"


class AudioWorldBenchmark(WorldBenchmark):
    name = "world_audio"
    world = AudioWorld


class VideoWorldBenchmark(WorldBenchmark):
    name = "world_video"
    world = VideoWorld
