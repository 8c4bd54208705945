"""The evaluation's charts: scores with their intervals by category, and confidence against accuracy.

Labels are escaped (`Markup.format`); colours are the page's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mm.report.plots import HEIGHT, WIDTH, Axis, spell, svg
from mm.report.run import Benchmark

MAX_BARS = 40  # of one chart
ROW = 22
LABEL = 130  # pixels for a bar's name
CONTROL_STYLES = ("s1", "s3", "s4")

Drawing = tuple[str, Markup, list[tuple[str, str]], str]  # title, picture, legend, sentence


@dataclass(frozen=True)
class Bar:
    """A score in [0, 1] with its 95 % interval, what a random choice scores, and what each control does."""

    name: str
    value: float
    interval: tuple[float, float] | None
    chance: float | None
    controls: tuple[float | None, ...]


def score_charts(bench: Benchmark) -> list[Drawing]:
    """Bars by category where there are several scores in [0, 1], and a calibration plot where confidences are known."""
    bars = [
        Bar(
            name.replace("_", " ").removesuffix(" accuracy"),
            value,
            bench.intervals.get(name),
            bench.chance.get(name),
            tuple(scores.get(name) for scores in bench.controls.values()),
        )
        for name, value in bench.scores.items()
        if 0 <= value <= 1
    ]
    drawn: list[Drawing] = []
    if len(bars) > 1 or any(bar.interval for bar in bars):
        text = "Whiskers: 95 % bootstrap intervals; dashed: a random choice; dots: controls."
        text += f" The first {MAX_BARS} of {len(bars)}." if len(bars) > MAX_BARS else ""
        legend = [(name.replace("_", " "), "") for name in bench.controls]
        drawn.append((f"{bench.name}: scores", bar_chart(bars[:MAX_BARS], f"scores of {bench.name}"), legend, text))
    if bench.calibration:
        sentence = f"Expected calibration error {spell(bench.calibration['ece'])}; a point is as large as its share."
        drawing = reliability(bench.calibration["bins"], f"calibration of {bench.name}")
        drawn.append((f"{bench.name}: is it right when it is sure?", drawing, [], sentence))
    return drawn


def bar_chart(bars: Sequence[Bar], label: str) -> Markup:
    """Horizontal bars on an axis from 0 to 1."""
    height = ROW * len(bars) + 20
    axis = Axis(0.0, 1.0, LABEL, WIDTH - 46)
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        grid = Markup('<path class="grid" d="M{:.1f} 0V{}"/><text x="{:.1f}" y="{}" class="mid soft">{:.0f}%</text>')
        parts.append(grid.format(axis(tick), height - 16, axis(tick), height - 4, 100 * tick))
    for number, bar in enumerate(bars):
        parts.append(_bar(bar, number * ROW, axis))
    return svg(parts, height, label)


def _bar(bar: Bar, top: float, axis: Axis) -> Markup:
    middle, start, end = top + ROW / 2, axis(0.0), axis(bar.value)
    told = f"{bar.name}: {100 * bar.value:.1f}%"
    if bar.interval:
        told += f", 95 % interval {100 * bar.interval[0]:.1f}% to {100 * bar.interval[1]:.1f}%"
    name = bar.name if len(bar.name) <= 22 else bar.name[:21] + "…"
    parts = [
        Markup('<text x="{}" y="{:.1f}" class="end">{}</text>').format(LABEL - 6, middle + 3.5, name),
        Markup(
            '<rect class="box" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="2"><title>{}</title></rect>'
        ).format(start, top + 5, max(end - start, 0.5), ROW - 10, told),
        Markup('<text x="{}" y="{:.1f}" class="end">{:.1f}</text>').format(WIDTH - 2, middle + 3.5, 100 * bar.value),
    ]
    if bar.interval:
        low, high = (axis(end) for end in bar.interval)
        whisker = f"M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 3:.1f}v6M{high:.1f} {middle - 3:.1f}v6"
        parts.append(Markup('<path class="whisker" d="{}"/>').format(whisker))
    if bar.chance is not None:
        line = Markup('<path class="mark" d="M{:.1f} {:.1f}v{}"/>')
        parts.append(line.format(axis(bar.chance), top + 2, ROW - 4))
    for number, control in enumerate(bar.controls):
        if control is not None:
            dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>')
            parts.append(dot.format(CONTROL_STYLES[number % 3], axis(control), middle))
    return Markup("").join(parts)


def reliability(bins: Sequence[dict[str, Any]], label: str) -> Markup:
    """Accuracy (up) against confidence (right), a point a bin; on the dashed line a model is as right as it is sure."""
    x_axis, y_axis = Axis(0.0, 1.0, 40, WIDTH - 18), Axis(0.0, 1.0, HEIGHT - 32, 10)
    parts = []
    for tick in (0.0, 0.5, 1.0):
        line = Markup('<path class="grid" d="M40 {:.1f}H{}"/><text x="35" y="{:.1f}" class="end">{:.0f}%</text>')
        parts.append(line.format(y_axis(tick), WIDTH - 18, y_axis(tick) + 3.5, 100 * tick))
        under = Markup('<text x="{:.1f}" y="{}" class="mid">{:.0f}%</text>')
        parts.append(under.format(x_axis(tick), HEIGHT - 18, 100 * tick))
    diagonal = Markup('<path class="mark" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>')
    parts.append(diagonal.format(x_axis(0), y_axis(0), x_axis(1), y_axis(1)))
    total = sum(each["n"] for each in bins) or 1
    for each in bins:
        told = f"{each['n']:,} answers: confidence {each['confidence']:.0%}, right {each['accuracy']:.0%}"
        point = Markup('<circle class="dot s0" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>')
        radius = 3 + 9 * (each["n"] / total) ** 0.5
        parts.append(point.format(x_axis(each["confidence"]), y_axis(each["accuracy"]), radius, told))
    parts.append(Markup('<text x="{}" y="{}" class="mid soft">confidence</text>').format(WIDTH / 2, HEIGHT - 4))
    return svg(parts, HEIGHT, label)
