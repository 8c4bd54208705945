"""Reads a run directory into plain records. What is missing or broken becomes a note for the page, never a guess.

RUN/[<stage>/]metrics.csv, routing.jsonl          one training stage each, down to lightning_logs/version_0
RUN/results/<benchmark>.json, .predictions.jsonl  scores with chance and controls; one line per sample
RUN/model/                                        the model directory
RUN/summary.json                                  what ran, and for how many seconds
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm.info import build_meta, describe

Curve = list[tuple[float, float]]  # (step, value)
MAX_DEPTH = 3  # folders between a run directory and a stage's metrics.csv


@dataclass
class RoutingLine:
    """One line of routing.jsonl: layer -> modality -> tokens per expert, since the line before."""

    step: int
    layers: dict[int, dict[str, list[int]]]


@dataclass
class Stage:
    """A training stage: its curves by metric name, and its routing over time."""

    name: str
    curves: dict[str, Curve]
    routing: list[RoutingLine]


@dataclass
class Prediction:
    """One scored sample. `media` are the files that exist inside the run directory."""

    question: str
    answers: list[str]
    text: str
    score: float
    category: str
    media: list[Path]
    generated: bool

    @property
    def right(self) -> bool:
        return self.score >= 0.5


@dataclass
class Benchmark:
    """One results/<name>.json: metric -> number, the same metrics by chance and under each control."""

    name: str
    scores: dict[str, float]
    chance: dict[str, float]
    controls: dict[str, dict[str, float]]
    samples: int | None
    generated: bool
    provenance: dict[str, Any]
    predictions: list[Prediction]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 % of each score
    calibration: dict[str, Any] | None = None  # {"ece", "bins": [{"n", "confidence", "accuracy"}]}


@dataclass
class Run:
    """Everything a page can show. `notes` say, one line each, what could not be read."""

    directory: Path
    summary: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    active: int | None = None
    stages: list[Stage] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(directory: Path) -> Run:
    """Raises ValueError if the directory holds no part of a run at all."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    run = Run(directory)
    metrics = sorted(path for depth in range(MAX_DEPTH + 1) for path in directory.glob("*/" * depth + "metrics.csv"))
    results = sorted((directory / "results").glob("*.json"))
    if not (metrics or results or (directory / "summary.json").exists() or (directory / "model").is_dir()):
        raise ValueError(
            f"{directory} is not a run directory: no summary.json, no model/, no results/*.json, no metrics.csv in it"
        )
    run.summary = _read_json(directory / "summary.json", run)
    run.manifest = _read_json(directory / "model" / "manifest.json", run)
    run.parameters, run.active = _count_parameters(directory / "model", run)
    metrics.sort(key=lambda path: path.stat().st_mtime)  # the order in which they ended
    run.stages = [_read_stage(path.parent, run) for path in metrics]
    run.benchmarks = [_read_benchmark(path, run) for path in results]
    return run


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under dotted names: {"a": {"b": 1}} -> ("a.b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_json(path: Path, run: Run) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        run.notes.append(f"{path.relative_to(run.directory)} is not valid JSON: {error}")
        return {}
    if not isinstance(value, dict):
        run.notes.append(f"{path.relative_to(run.directory)} holds a {type(value).__name__}, not an object")
        return {}
    return value


def _read_lines(path: Path, run: Run) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file; lines that are none are counted in a note (a killed run tears its last line)."""
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            yield value
        else:
            broken += 1
    if broken:
        run.notes.append(f"{path.relative_to(run.directory)}: {broken} unreadable line(s) left out")


def _read_stage(directory: Path, run: Run) -> Stage:
    name = str(directory.relative_to(run.directory)) if directory != run.directory else directory.resolve().name
    curves, lost = _read_curves(directory / "metrics.csv")
    run.notes += [f"{name}: {metric} was not finite {count} times" for metric, count in lost.items()]
    routing = []
    if (directory / "routing.jsonl").exists():
        for line in _read_lines(directory / "routing.jsonl", run):
            layers = {int(layer["layer"]): layer["counts"] for layer in line["layers"]}
            routing.append(RoutingLine(int(line["step"]), layers))
    return Stage(name, curves, routing)


def _read_curves(path: Path) -> tuple[dict[str, Curve], Counter[str]]:
    """Columns of Lightning's CSV against its `step`, and how often each was not finite; empty cells are no values."""
    curves: dict[str, Curve] = {}
    lost: Counter[str] = Counter()
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.pop("step", None))
            row.pop("epoch", None)
            for name, cell in row.items():
                value = _number(cell)
                if value is not None and step is not None:
                    curves.setdefault(name, []).append((step, value))
                elif cell:
                    lost[name] += 1
    return {name: sorted(curve) for name, curve in curves.items()}, lost


def _number(cell: object) -> float | None:
    try:
        value = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _numbers(tree: object) -> dict[str, float]:
    """The finite numbers in a tree of mappings, under dotted names; a bare number is called `score`."""
    leaves = flatten(tree) if isinstance(tree, Mapping) else [("score", tree)]
    return {name: number for name, value in leaves if (number := _number(value)) is not None}


def _read_benchmark(path: Path, run: Run) -> Benchmark:
    result = _read_json(path, run)
    provenance = result.get("provenance") or {}
    generated = bool(result.get("generated") or provenance.get("generated"))
    predictions = path.with_suffix(".predictions.jsonl")
    if not predictions.exists():
        run.notes.append(f"{path.relative_to(run.directory)} has no {predictions.name} beside it: no gallery for it")
    return Benchmark(
        name=str(result.get("benchmark", path.stem)),
        scores=_numbers(result.get("scores", {})),
        chance=_numbers(result.get("chance", {})),
        controls={str(name): _numbers(scores) for name, scores in (result.get("controls") or {}).items()},
        samples=result.get("n"),
        generated=generated,
        provenance=provenance,
        predictions=[_prediction(line, path, run, generated) for line in _read_lines(predictions, run)]
        if predictions.exists()
        else [],
        intervals={
            str(name): (float(ends[0]), float(ends[1])) for name, ends in (result.get("intervals") or {}).items()
        },
        calibration=result.get("calibration"),
    )


def _prediction(line: dict[str, Any], result: Path, run: Run, generated: bool) -> Prediction:
    media = line.get("media") or []
    answers = line.get("answers", line.get("answer", []))
    names = [media] if isinstance(media, str) else media
    files = (_inside(run.directory, result.parent, str(name)) for name in names)
    return Prediction(
        question=str(line.get("question", "")),
        answers=[str(answer) for answer in (answers if isinstance(answers, list) else [answers])],
        text=str(line.get("prediction", "")),
        score=_number(line.get("score")) or 0.0,
        category=str(line.get("category") or ""),
        media=[file for file in files if file is not None],
        generated=generated or bool(line.get("generated") or (line.get("meta") or {}).get("generated")),
    )


def _inside(run: Path, results: Path, name: str) -> Path | None:
    """The file a predictions line names, if it is inside the run: a page must not pick up the machine's other files."""
    path = (results / name).resolve()
    return path if path.is_relative_to(run.resolve()) and path.is_file() else None


def _count_parameters(model: Path, run: Run) -> tuple[int | None, int | None]:
    """All and active parameters of a model directory, counted from its config."""
    if not model.is_dir():
        return None, None
    try:
        info = describe(build_meta(model))
    except ValueError as error:
        run.notes.append(f"the model's parameters could not be counted: {error}")
        return None, None
    return info.parameters, info.active
