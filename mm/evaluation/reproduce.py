"""`mm validate --reproduce RESULT.json`: runs an evaluation again from what its result says, and compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import mm
from mm.evaluation import results
from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.compare import provenance_differences
from mm.evaluation.runner import evaluate
from mm.parts import build

SHOWN = 5  # differing predictions that are printed


@dataclass
class Reproduction:
    """What came out differently. `same` if no score and no prediction did; versions, a device, ... may differ."""

    result: dict[str, Any]
    scores: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    predictions: dict[str, tuple[str, str]] = field(default_factory=dict)
    provenance: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        return not self.scores and not self.predictions


def reproduce(file: Path, output: Path, model: str | Path | None = None, show_progress: bool = True) -> Reproduction:
    """Evaluates again, with the settings of the result `file`, and writes the new result under `output`.

    `model` is where the model lies now, by default where it lay. Raises ValueError if the model or the data is another
    one than the result's: that would be another result, not the same one again.
    """
    before = results.read_result(file)
    told = before["provenance"]
    where = model or told["model"]["path"]
    if where is None:
        raise ValueError(f"{file}: the result does not say where its model is; give --model.model DIR")
    benchmark = build(told["benchmark"], Benchmark)
    after = evaluate(
        mm.load(where),
        benchmark,
        output=output,
        model_path=where,
        show_progress=show_progress,
        **{name: told[name] for name in ("controls", "limit", "batch_size", "seed")},
    )
    new = after["provenance"]
    for what, path in (("model", ("model", "manifest_sha256")), ("data", ("dataset", "fingerprint"))):
        old_hash, new_hash = (_inside(tree, path) for tree in (told, new))
        if old_hash != new_hash:
            raise ValueError(f"{file}: not the same {what}: {'.'.join(path)} was {old_hash}, is {new_hash}")
    found = Reproduction(after, provenance=provenance_differences(told, new))
    for group, name, old, now in _all_scores(before, after):
        if old != now:
            found.scores[f"{group}{name}"] = (old, now)
    old_lines = results.read_predictions(file.with_suffix(".predictions.jsonl"))
    new_lines = results.read_predictions(output / f"{benchmark.name}.predictions.jsonl")
    for key in dict.fromkeys((*old_lines, *new_lines)):
        old_text, new_text = (lines[key].text if key in lines else "(none)" for lines in (old_lines, new_lines))
        if old_text != new_text:
            found.predictions[key] = (old_text, new_text)
    return found


def _inside(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _all_scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """(group, score, old, new) of the scores, and of each control's."""
    groups = [("", before["scores"], after["scores"])]
    for control in dict.fromkeys((*before["controls"], *after["controls"])):
        groups.append((f"{control}.", before["controls"].get(control, {}), after["controls"].get(control, {})))
    return [(g, name, old.get(name), new.get(name)) for g, old, new in groups for name in dict.fromkeys((*old, *new))]


def show(console: Console, file: Path, found: Reproduction) -> None:
    for name, (old, new) in found.provenance.items():
        console.print(f"{name} was {old!r}, is {new!r}", style="dim", markup=False, highlight=False, soft_wrap=True)
    for name, (old, new) in found.scores.items():
        console.print(f"{name} was {old}, is {new}", markup=False, highlight=False)
    for key, (old, new) in list(found.predictions.items())[:SHOWN]:
        console.print(f"{key}: was {old!r}, is {new!r}", markup=False, highlight=False, soft_wrap=True)
    if len(found.predictions) > SHOWN:
        console.print(f"... and {len(found.predictions) - SHOWN} more predictions")
    n = found.result["n"]
    verdict = f"the same scores and the same {n:,} predictions" if found.same else (
        f"NOT reproduced: {len(found.scores)} scores and {len(found.predictions)} of {n:,} predictions differ"
    )  # fmt: skip
    console.print(f"{file}: {verdict}", markup=False, highlight=False)
