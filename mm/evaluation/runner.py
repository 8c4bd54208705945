"""Runs a model on a benchmark: responses, scores beside chance and controls, and what produced them, on disk.

    samples -> requests -> respond -> responses -> marks -> records -> result     once for real, once for each control

Any number of ranks shares the requests, and every rank returns the same result; a killed run goes on where it was.
Decoding is greedy unless a benchmark asks for samples, whose random numbers come from their ids: results repeat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mm.evaluation import results
from mm.evaluation.benchmarks.base import Benchmark, answers_hidden, check_samples, hidden_records
from mm.evaluation.calibration import reliability
from mm.evaluation.controls import question_only, shuffled_media
from mm.evaluation.journal import Journal, request_key
from mm.evaluation.provenance import describe, identity_of
from mm.evaluation.ranks import gather, on_first, rank_and_count
from mm.evaluation.records import Record, Response, make_records
from mm.evaluation.respond import Respond, respond
from mm.types import Sample

GALLERY = 24  # records whose media are kept
CHUNK = 4  # batches between two looks at the running score, and two writes to the journal


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
    respond: Respond = respond,
) -> dict[str, Any]:
    """Asks a model the benchmark's questions and returns the result, also written under `output` if given.

    The result: {"benchmark", "n", "scores", "intervals", "chance", "controls": {"question_only", "shuffled_media"},
    "controls_n", "calibration", "seconds", "provenance"}; `results` says which files it becomes. "intervals" are 95 %
    bootstrap intervals; "chance" is what a random choice scores; controls ask the questions that the benchmark names
    (`controls_n` of them), and their scores are over those. `limit` takes the first questions only; `seed` shuffles the
    media of the control; `model_path` is the directory whose hash is recorded: with it and `output`, responses are kept
    as they come, and a run that was killed goes on.

    Raises ValueError for a benchmark with duplicate ids or empty answers, and MediaError for media that cannot be read.
    """
    started = time.perf_counter()
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give a whole number from 1 up, or none")
    everything = benchmark.samples()
    check_samples(everything, benchmark.origin())
    samples = everything[:limit]
    rank, ranks = rank_and_count()
    settings = {"controls": controls, "limit": limit, "batch_size": batch_size, "seed": seed}
    provenance = on_first(lambda: describe(model, benchmark, samples, model_path, {**settings, "ranks": ranks}))
    journal = None
    if output is not None and model_path is not None:
        journal = Journal(Path(output) / f"{benchmark.name}.journal", identity_of(provenance), rank)
    # Rank 0 reads before any rank may write: all share out the same requests.
    known = on_first(journal.read) if journal is not None else {}
    run = _Run(model, benchmark, batch_size, respond, journal, known)
    asked = {"": samples, **(_control_samples(benchmark, samples, seed) if controls else {})}
    with _progress(show_progress and rank == 0) as bar:
        given = {
            name: run.ask(chosen, _Bar(bar, f"{benchmark.name} {name}", len(chosen))) for name, chosen in asked.items()
        }

    def finish() -> dict[str, Any]:
        records = _records(benchmark, samples, given[""])
        hidden = answers_hidden(samples)
        controlled = {name: _records(benchmark, asked[name], given[name]) for name in asked if name}
        result = {
            "benchmark": benchmark.name,
            "n": len(samples),
            "scores": {} if hidden else benchmark.aggregate(records),
            "intervals": {} if hidden else _intervals(benchmark, records),
            "chance": {} if hidden else benchmark.chance(everything, limit),
            "controls": {name: benchmark.aggregate_controls(found) for name, found in controlled.items() if not hidden},
            "controls_n": {name: len(found) for name, found in controlled.items() if not hidden},
            "calibration": None if hidden else reliability(records),
            "seconds": round(time.perf_counter() - started, 2),
            "provenance": provenance,
        }
        if output is not None:
            results.keep_gallery(Path(output), benchmark.name, samples, records, 0 if hidden else GALLERY)
            results.write(Path(output), result, records, benchmark.submission(records))
        return result

    result = on_first(finish)
    if journal is not None:
        journal.close()
        on_first(journal.remove)
    return result


def _records(benchmark: Benchmark, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Record]:
    if answers_hidden(samples):
        return hidden_records(samples, responses)
    return make_records(samples, responses, benchmark.mark_all(samples, responses))


def _intervals(benchmark: Benchmark, records: Sequence[Record]) -> dict[str, list[float]]:
    """95 % intervals of the scores that are means over samples."""
    ends = {name: statistic.interval() for name, statistic in benchmark.statistics(records).items()}
    return {name: [low, high] for name, (low, high) in ends.items() if math.isfinite(low) and math.isfinite(high)}


def _control_samples(benchmark: Benchmark, samples: Sequence[Sample], seed: int) -> dict[str, list[Sample]]:
    """The samples of each control; a control that would ask nothing is left out."""
    subset = [sample for sample in samples if benchmark.controlled(sample)]
    asked = {"question_only": question_only(subset), "shuffled_media": shuffled_media(subset, seed)}
    return {name: chosen for name, chosen in asked.items() if chosen}


@dataclass
class _Run:
    """Requests of one benchmark to one model. Samples that look the same to the model are one request."""

    model: Any
    benchmark: Benchmark
    batch_size: int
    respond: Respond
    journal: Journal | None
    known: dict[str, Response] = field(default_factory=dict)  # by request key

    def ask(self, samples: Sequence[Sample], bar: _Bar) -> list[Response]:
        """One response a sample, the same on every rank."""
        sampled = self.benchmark.temperature > 0  # then equal questions are still to be asked apart
        keys = [request_key(sample, sample.key if sampled else "") for sample in samples]
        askers: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            askers.setdefault(key, []).append(index)
        mine = self._share([askers[key][0] for key in askers if key not in self.known], samples)
        bar.update([index for key in askers if key in self.known for index in askers[key]], samples, keys, self)
        new: dict[str, Response] = {}
        size = CHUNK * self.batch_size
        for start in range(0, len(mine), size):
            chunk = mine[start : start + size]
            given = self.respond(self.model, self.benchmark, [samples[index] for index in chunk], self.batch_size)
            found = {keys[index]: response for index, response in zip(chunk, given, strict=True)}
            if self.journal is not None:
                self.journal.add(found)
            new |= found
            self.known |= found
            bar.update([index for own in chunk for index in askers[keys[own]]], samples, keys, self)
        for part in gather(new):
            self.known |= part
        return [self.known[key] for key in keys]

    def _share(self, indices: Sequence[int], samples: Sequence[Sample]) -> list[int]:
        """This rank's part of the requests. Those with the same media stay together, and those of like size are
        neighbours: text and media are compared by their own lengths, which costs no decoding."""
        groups: dict[Any, list[int]] = {}
        for index in indices:
            media = tuple((item.kind, item.data) for item in samples[index].media)
            groups.setdefault(media or index, []).append(index)
        rank, count = rank_and_count()
        ordered = sorted(groups.values(), key=lambda group: (_size(samples[group[0]]), group[0]), reverse=True)
        return [index for group in ordered[rank::count] for index in group]


def _size(sample: Sample) -> tuple[int, int]:
    """Number of media, then characters of text."""
    contents = [message["content"] for message in sample.messages]
    text = sum(
        len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
        for content in contents
    )
    return len(sample.media), text + len(str(sample.meta.get("text", "")))


class _Bar:
    """One line of the progress display: questions answered by this rank and their running score."""

    def __init__(self, progress: Progress | None, name: str, total: int) -> None:
        self._progress = progress
        self._done, self._total = 0, 0.0
        self._task = None if progress is None else progress.add_task(name.strip(), total=total, score="")

    def update(self, indices: Sequence[int], samples: Sequence[Sample], keys: Sequence[str], run: _Run) -> None:
        if self._progress is None or self._task is None or not indices:
            return
        self._done += len(indices)
        score = ""
        if run.benchmark.running_score and not answers_hidden(samples):
            responses = [run.known[keys[index]] for index in indices]
            marks = run.benchmark.mark_all([samples[index] for index in indices], responses)
            self._total += math.fsum(mark.score for mark in marks)
            score = f"score {self._total / self._done:.3f}"
        self._progress.update(self._task, completed=self._done, score=score)


def _progress(show: bool) -> AbstractContextManager[Progress | None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[score]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) if show else nullcontext()
