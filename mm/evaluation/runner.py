"""Runs a model on a benchmark: predictions, scores beside chance and controls, and what produced them, on disk.

    samples -> generate -> predictions -> score -> aggregate        once for real, once for each control

Decoding is greedy, so a result is repeatable.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mm.evaluation import results
from mm.evaluation.benchmarks.base import Benchmark, Record, check_samples, records_of
from mm.evaluation.controls import question_only, shuffled_media
from mm.evaluation.provenance import describe
from mm.types import Sample

GALLERY = 24  # records whose media are kept
CHUNK = 16  # batches between two looks at the running score


class Answer(Protocol):
    @property
    def text(self) -> str: ...


class Generate(Protocol):
    """`mm.evaluation.shared_media.generate_shared`, `mm.generation.engine.generate`, or a stand-in."""

    def __call__(
        self,
        model: Any,
        samples: list[Sample],
        /,
        *,
        max_new_tokens: int,
        batch_size: int,
    ) -> Sequence[Answer]: ...


def evaluate(
    model: Any,
    benchmark: Benchmark,
    *,
    output: str | Path | None = None,
    controls: bool = True,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    model_path: str | Path | None = None,
    show_progress: bool = True,
    generate: Generate | None = None,
) -> dict[str, Any]:
    """Asks a model the benchmark's questions (greedy) and returns the result, also written under `output` if given.

    The result: {"benchmark", "n", "scores", "chance", "controls": {"question_only", "shuffled_media"}, "controls_n",
    "seconds", "provenance"}; every score is a fraction. Controls ask the questions that the benchmark names
    (`controls_n` of them), and their scores are over those. `limit` takes the first questions only; `seed` shuffles
    the media of the control; `model_path` is the directory whose manifest is recorded.

    Raises ValueError for a benchmark with duplicate ids or empty answers, and MediaError for media that cannot be read.
    """
    if generate is None:
        from mm.evaluation.shared_media import generate_shared as generate

    started = time.perf_counter()
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give a whole number from 1 up, or none")
    everything = benchmark.samples()
    check_samples(everything, benchmark.origin())
    samples = everything[:limit]

    def predict(name: str, asked: list[Sample], bar: Progress | None) -> list[Record]:
        line = _Bar(bar, f"{benchmark.name} {name}", len(asked))
        texts = _predict(model, benchmark, asked, generate, batch_size, line)
        return records_of(asked, texts, benchmark.score_all(asked, texts))

    with _progress(show_progress) as bar:
        records = predict("", samples, bar)
        controlled = _control_samples(benchmark, samples, seed) if controls else {}
        control_records = {name: predict(name, asked, bar) for name, asked in controlled.items()}

    result = {
        "benchmark": benchmark.name,
        "n": len(samples),
        "scores": benchmark.aggregate(records),
        "chance": benchmark.chance(everything, limit),
        "controls": {name: benchmark.aggregate_controls(answered) for name, answered in control_records.items()},
        "controls_n": {name: len(answered) for name, answered in control_records.items()},
        "seconds": round(time.perf_counter() - started, 2),
        "provenance": describe(
            model,
            benchmark,
            samples,
            model_path=model_path,
            decoding={"method": "greedy", "max_new_tokens": benchmark.max_new_tokens, "batch_size": batch_size},
            seed=seed,
            limit=limit,
        ),
    }
    if output is not None:
        results.keep_gallery(Path(output), benchmark.name, samples, records, GALLERY)
        results.write(Path(output), result, records)
    return result


def _control_samples(benchmark: Benchmark, samples: Sequence[Sample], seed: int) -> dict[str, list[Sample]]:
    """The samples of each control; a control that would ask nothing is left out."""
    subset = [sample for sample in samples if benchmark.controlled(sample)]
    asked = {"question_only": question_only(subset), "shuffled_media": shuffled_media(subset, seed)}
    return {name: chosen for name, chosen in asked.items() if chosen}


def _predict(
    model: Any, benchmark: Benchmark, samples: Sequence[Sample], generate: Generate, batch_size: int, bar: _Bar
) -> list[str]:
    """One text a sample. Requests that are the same to the model are answered once (decoding is greedy)."""
    keys = [_request_key(sample) for sample in samples]
    askers: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        askers.setdefault(key, []).append(index)
    groups = list(askers.values())
    texts: dict[int, str] = {}
    total = 0.0
    for start in range(0, len(groups), CHUNK * batch_size):
        chunk = groups[start : start + CHUNK * batch_size]
        asked = [samples[group[0]] for group in chunk]
        answers = generate(model, asked, max_new_tokens=benchmark.max_new_tokens, batch_size=batch_size)
        for group, answer in zip(chunk, answers, strict=True):
            for index in group:
                texts[index] = answer.text
                total += benchmark.score(samples[index], answer.text)
        bar.update(len(texts), total)
    return [texts[index] for index in range(len(samples))]


def _request_key(sample: Sample) -> tuple[Any, ...]:
    """Equal for samples that look the same to the model."""
    return json.dumps(sample.messages, sort_keys=True), *((item.kind, item.data) for item in sample.media)


class _Bar:
    """One line of the progress display: questions answered and the running score."""

    def __init__(self, progress: Progress | None, name: str, total: int) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(name.strip(), total=total, score="")

    def update(self, done: int, total_score: float) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, score=f"score {total_score / done:.3f}")


def _progress(show: bool) -> AbstractContextManager[Progress | None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[score]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) if show else nullcontext()
