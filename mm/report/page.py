"""`mm report RUN_DIR [--out FILE]`: a run's page. One HTML file, no script, nothing fetched from anywhere."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import mm
from mm.arguments import Parser
from mm.info import count
from mm.report import plots
from mm.report.evaluation import score_charts
from mm.report.media import Embedded, embed
from mm.report.run import Benchmark, Curve, Prediction, Run, Stage, flatten, read_run
from mm.types import MODALITIES

STYLE = Path(__file__).with_name("style.css")
GALLERY = 12  # samples shown of each benchmark, a third of them wrong ones if there are that many
RECENT = 0.2  # the share of a stage's routing lines, from its end, that the heat maps sum


@dataclass(frozen=True)
class Ran:
    """One step of a run. `share` is its part of the longest step's seconds."""

    name: str
    command: str
    seconds: float | None
    share: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading, the names of its curves with their last values, and a sentence under it."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]]
    text: str = ""


@dataclass(frozen=True)
class StageView:
    """A stage as the page shows it. A heat map's colour is full at `top` times an even share."""

    stage: Stage
    speed: str
    curves: list[Chart]
    once: list[tuple[str, str]]  # what was measured at one step only, with its value
    routing: list[Chart]
    top: float


@dataclass(frozen=True)
class Card:
    """One sample of the gallery."""

    prediction: Prediction
    media: list[Embedded]


def main(argv: Sequence[str]) -> int:
    """Writes the page and says where. Raises ValueError if the directory is not a run."""
    parser = Parser(
        "mm report",
        "Make a run's page: one HTML file that needs nothing beside it, with losses, routing, scores and samples.",
        examples=["mm report runs/demo"],
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run directory, such as runs/demo")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: RUN_DIR/report.html)")
    options = parser.parse_args(argv)
    out = write(options.run, options.out)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def write(directory: Path, out: Path | None = None) -> Path:
    """Reads a run and writes its page, whole or not at all; returns where. Raises ValueError if it is not a run."""
    html = render(read_run(directory))
    out = out or directory / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(html, encoding="utf-8")
    os.replace(draft, out)
    return out


def render(run: Run) -> str:
    """The page as HTML text. Jinja escapes everything that is not a drawing of `plots`."""
    folder = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.loader = FileSystemLoader(folder)
    environment.filters |= {"percent": percent, "duration": duration, "flatten": flatten}
    return environment.get_template("page.html").render(
        run=run,
        title=run.directory.resolve().name,
        style=Markup(STYLE.read_text(encoding="utf-8")),
        version=mm.__version__,
        python=platform.python_version(),
        versions=run.manifest.get("versions") or run.summary.get("versions") or {},
        facts=facts(run),
        ran=what_ran(run.summary),
        stages=[view(stage) for stage in run.stages],
        controls=control_names(run.benchmarks),
        score_charts=[Chart(*drawing) for bench in run.benchmarks for drawing in score_charts(bench)],
        galleries=[(bench, gallery(bench), shares(bench)) for bench in run.benchmarks if bench.predictions],
        summary=[(name, value) for name, value in flatten(run.summary) if isinstance(value, (int, float, str))],
        missing=missing(run),
    )


def facts(run: Run) -> list[tuple[str, str, str]]:
    """The page's first look: (number, what it is, what to hold it against)."""
    found = []
    if run.parameters:
        found.append((count(run.parameters), "parameters", f"{count(run.active or run.parameters)} active per token"))
    for bench in run.benchmarks:
        for metric, score in list(bench.scores.items())[:1]:
            chance = bench.chance.get(metric)
            name = f"{bench.name} {metric}".replace("_", " ")
            found.append((percent(score), name, f"chance {percent(chance)}" if chance is not None else ""))
    total = dict(flatten(run.summary)).get("seconds.total")
    if isinstance(total, (int, float)):
        found.append((duration(total), "from start to end", ""))
    return found


def what_ran(summary: dict[str, Any]) -> list[Ran]:
    """`stages` of summary.json ({name, command, seconds}), then any `seconds.<name>` that no stage accounts for."""
    stages = summary.get("stages") or []
    rows = [Ran(str(s.get("name", "")), str(s.get("command", "")), s.get("seconds")) for s in stages]
    named = {row.name for row in rows} | {"total"}
    for name, value in flatten(summary):
        step = name.removeprefix("seconds.")
        if step != name and step not in named and isinstance(value, (int, float)):
            rows.append(Ran(step, "", value))
    longest = max((row.seconds or 0.0 for row in rows), default=0.0) or 1.0
    return [Ran(row.name, row.command, row.seconds, (row.seconds or 0.0) / longest) for row in rows]


def view(stage: Stage) -> StageView:
    lately = _recent_loads(stage)
    shares = [max(load) * len(load) / sum(load) for loads in lately.values() for load in loads.values()]
    top = max([2.0, *shares])
    curves, once = stage_charts(stage)
    return StageView(stage, throughput(stage), curves, once, routing_charts(stage, lately, top), top)


def stage_charts(stage: Stage) -> tuple[list[Chart], list[tuple[str, str]]]:
    """The loss, its parts, the other scores of training and validation, and the learning rate.

    What was measured once has no curve: its names and values are given apart.
    """
    plain = {name.removesuffix("_step"): curve for name, curve in stage.curves.items() if not name.endswith("_epoch")}
    groups: dict[str, dict[str, Curve]] = {}
    for name, curve in plain.items():
        leaf = name.rpartition("/")[2]
        if name.startswith(("throughput/", "routing/")):
            continue
        heading = (
            "Loss" if leaf == "loss"
            else "Learning rate" if leaf.startswith("lr")
            else "Parts of the loss" if "loss" in leaf
            else "Recall" if leaf.startswith("recall")
            else name.partition("/")[2].replace("/", ": ").replace("_", " ").capitalize() or leaf.capitalize()
        )  # fmt: skip
        groups.setdefault(heading, {})[name] = curve
    drawn = {heading for heading, curves in groups.items() if any(len(curve) > 1 for curve in curves.values())}
    order = sorted(
        drawn, key=lambda heading: (heading != "Loss", heading == "Learning rate", list(groups).index(heading))
    )
    once = [value for heading, curves in groups.items() if heading not in drawn for value in _last_values(curves)]
    return [_chart(heading, groups[heading], f"{heading} of {stage.name}") for heading in order], once


def throughput(stage: Stage) -> str:
    """The middle of what `Throughput` logged, in words; empty if it logged nothing."""
    spelled = []
    for name, unit, form in (
        ("tokens_per_second", "tokens/s", plots.spell),
        ("samples_per_second", "samples/s", plots.spell),
        ("non_padding", "of positions not padding", percent),
    ):
        values = sorted(value for _, value in stage.curves.get(f"throughput/{name}", []))
        if values:
            spelled.append(f"{form(values[len(values) // 2])} {unit}")
    return ", ".join(spelled)


def routing_charts(stage: Stage, lately: dict[str, dict[int, list[int]]], top: float) -> list[Chart]:
    """Heat maps of where each modality went lately, and each layer's load imbalance over time."""
    charts = []
    for modality, loads in lately.items():
        choices = plots.spell(sum(next(iter(loads.values()))))
        svg = plots.heat_map(loads, top=top, label=f"expert load of {modality} tokens in {stage.name}")
        text = f"{choices} choices a layer, up to step {stage.routing[-1].step:,}"
        charts.append(Chart(f"{modality.capitalize()} tokens", svg, [], text))
    imbalance: dict[str, Curve] = {}
    for line in stage.routing:
        for layer, counts in line.layers.items():
            load = [sum(column) for column in zip(*counts.values(), strict=True)]
            if sum(load):
                imbalance.setdefault(f"layer {layer}", []).append((line.step, max(load) * len(load) / sum(load)))
    if imbalance:
        worst = dict(sorted(imbalance.items(), key=lambda item: -item[1][-1][1])[:6])
        svg = plots.line_chart(worst, label=f"load imbalance of {stage.name}", marks=(1.0, 2.0), floor=0.9)
        text = "Busiest expert / mean; 1 is even." + (" The six least even layers." if len(imbalance) > 6 else "")
        charts.append(Chart("Load imbalance", svg, _last_values(worst), text))
    return charts


def _recent_loads(stage: Stage) -> dict[str, dict[int, list[int]]]:
    """Modality -> layer -> tokens per expert, over the last lines; what was never routed is left out."""
    total: dict[str, dict[int, list[int]]] = {name: {} for name in MODALITIES}
    for line in stage.routing[-max(1, round(RECENT * len(stage.routing))) :]:
        for layer, counts in sorted(line.layers.items()):
            for modality, load in counts.items():
                before = total[modality].get(layer, [0] * len(load))
                if any(load):
                    total[modality][layer] = [a + b for a, b in zip(before, load, strict=True)]
    return {name: loads for name, loads in total.items() if loads}


def _chart(title: str, curves: dict[str, Curve], label: str) -> Chart:
    floor = 0.0 if title == "Learning rate" else None
    return Chart(title, plots.line_chart(curves, label=label, floor=floor), _last_values(curves))


def _last_values(curves: dict[str, Curve]) -> list[tuple[str, str]]:
    return [(name, plots.spell(plots.smooth(curve)[-1][1])) for name, curve in curves.items()]


def control_names(benchmarks: list[Benchmark]) -> list[str]:
    """Every control that some benchmark has, in the order of first sight."""
    return list(dict.fromkeys(name for bench in benchmarks for name in bench.controls))


def gallery(bench: Benchmark) -> list[Card]:
    """Right and wrong samples, each spread evenly over the categories and then over the file.

    An evaluation keeps the media of some samples only: where it kept any, those are shown.
    """
    seen = [p for p in bench.predictions if p.media] or bench.predictions
    right = _spread([p for p in seen if p.right])
    wrong = _spread([p for p in seen if not p.right])
    wrongs = min(len(wrong), max(GALLERY // 3, GALLERY - len(right)))
    shown = right[: GALLERY - wrongs] + wrong[:wrongs]
    return [Card(prediction, [embed(path) for path in prediction.media]) for prediction in shown]


def shares(bench: Benchmark) -> str:
    """How the gallery's choice compares with all of the benchmark's samples."""
    right = sum(p.right for p in bench.predictions)
    return f"chosen from {right:,} right and {len(bench.predictions) - right:,} wrong"


def _spread(predictions: list[Prediction]) -> list[Prediction]:
    """The samples in turns: one of each category, again and again, each category from samples far apart in the file."""
    ordered = sorted(predictions, key=lambda p: p.category)
    turns = []
    for _, members in groupby(ordered, key=lambda p: p.category):
        members = list(members)
        stride = max(1, len(members) // GALLERY)
        far = members[::stride] + [m for i, m in enumerate(members) if i % stride]
        turns += list(enumerate(far[:GALLERY]))
    return [prediction for _, prediction in sorted(turns, key=lambda turn: turn[0])]


def missing(run: Run) -> list[str]:
    """What the page has no part for, named, so that its absence is not taken for a good sign."""
    gaps = {
        "no summary.json: what ran and for how long is not known": run.summary,
        "no model/manifest.json: the versions that made the model are not known": run.manifest,
        "no model to count: the model's size is not known": run.parameters,
        "no training stage: no metrics.csv was found": run.stages,
        "no routing recorded: no stage has a routing.jsonl": [s for s in run.stages if s.routing],
        "no evaluation: results/ holds no scores": run.benchmarks,
        "no samples: no results/*.predictions.jsonl was found": [b for b in run.benchmarks if b.predictions],
    }
    return [gap for gap, found in gaps.items() if not found] + run.notes


def percent(value: float) -> str:
    """A fraction as a percentage; any other number as it is."""
    return f"{100 * value:.1f}%" if 0 <= value <= 1 else plots.spell(value)


def duration(seconds: float) -> str:
    """7.3 s, 2 min 05 s, 1 h 04 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
