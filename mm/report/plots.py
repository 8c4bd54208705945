"""Charts as inline SVG: they take the page's colours, so one drawing serves light and dark, screen and paper.

Drawn in a box about as wide as a phone, so that their text stays readable there and grows on larger screens.
Every label is escaped (`Markup.format`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mm.report.run import Curve

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 10, 32
STRIPS = 48  # invisible columns that carry the tooltips of a line chart
LOG_FROM = 30  # a range of values this wide is drawn on a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly or in logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis: four or so; of a logarithmic one 1, 2 and 5, or only powers of ten."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(powers) >= 4:
                return [10.0**power for power in powers]
            return [mantissa * 10.0**power for power in range(-12, 13) for mantissa in (1, 2, 5)
                    if self.low <= mantissa * 10.0**power <= self.high]  # fmt: skip
        rough = (self.high - self.low) / 4 or 1.0
        power = 10 ** math.floor(math.log10(rough))
        step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def smooth(curve: Curve, points: int = 240) -> Curve:
    """At most `points` bin means of a curve, then a running mean over a fortieth of them (at least one)."""
    per_bin = -(-len(curve) // points)
    bins = [curve[i : i + per_bin] for i in range(0, len(curve), per_bin)]
    means = [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in bins]
    reach = len(means) // 40
    result = []
    for i, (step, _) in enumerate(means):
        near = means[max(0, i - reach) : i + reach + 1]
        result.append((step, sum(y for _, y in near) / len(near)))
    return result


def line_chart(
    curves: dict[str, Curve], *, label: str, marks: Sequence[float] = (), floor: float | None = None
) -> Markup:
    """Curves over steps, with dashed lines at `marks`. `label` says what the chart shows to a screen reader.

    `floor` pins the lower end of the axis. Curves must not be empty.
    """
    smoothed = {name: smooth(curve) for name, curve in curves.items()}
    values = [y for curve in smoothed.values() for _, y in curve] + list(marks)
    low, high = min(values), max(values)
    log = floor is None and low > 0 and high / low > LOG_FROM
    pad = 0.0 if log else 0.05 * ((high - low) or abs(high) or 1.0)
    low = floor if floor is not None else low - pad if low < 0 or low - pad > 0 or log else 0.0
    steps = [x for curve in curves.values() for x, _ in curve]
    x_axis = Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y_axis = Axis(low, high + pad, HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x_axis, y_axis)]
    for mark in marks:
        y = y_axis(mark)
        parts.append(Markup('<path class="mark" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
    for number, curve in enumerate(smoothed.values()):
        parts.append(_line(curve, x_axis, y_axis, f"line s{number % 6}"))
    parts.append(_tooltips(smoothed, x_axis))
    return svg(parts, HEIGHT, label)


def _line(curve: Curve, x_axis: Axis, y_axis: Axis, style: str) -> Markup:
    if len(curve) == 1:
        [(x, y)] = curve
        return Markup('<circle class="{} dot" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, x_axis(x), y_axis(y))
    path = "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in curve)
    return Markup('<path class="{}" d="M{}"/>').format(style, path)


def _grid(x_axis: Axis, y_axis: Axis) -> Markup:
    parts, under = [], HEIGHT - BOTTOM + 14
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(Markup('<text x="{}" y="{:.1f}" class="end">{}</text>').format(LEFT - 5, y + 3.5, spell(tick)))
    for tick in x_axis.ticks():
        parts.append(Markup('<text x="{:.1f}" y="{}" class="mid">{}</text>').format(x_axis(tick), under, spell(tick)))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(Markup('<text x="{}" y="{}" class="mid soft">step</text>').format(middle, HEIGHT - 4))
    return Markup("").join(parts)


def _tooltips(curves: dict[str, Curve], x_axis: Axis) -> Markup:
    """One invisible column per stretch of steps, whose tooltip names the nearest point of every curve."""
    width = (x_axis.end - x_axis.start) / STRIPS
    parts = []
    for strip in range(STRIPS):
        step = x_axis.low + (strip + 0.5) / STRIPS * (x_axis.high - x_axis.low)
        near = {name: min(curve, key=lambda point: abs(point[0] - step)) for name, curve in curves.items()}
        text = "\n".join([f"step {step:.0f}", *(f"{name} {spell(y)}" for name, (_, y) in near.items())])
        box = Markup('<rect class="tip" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
        parts.append(box.format(x_axis.start + strip * width, TOP, width, HEIGHT - BOTTOM - TOP, text))
    return Markup("").join(parts)


def heat_map(counts: dict[int, list[int]], *, top: float, label: str) -> Markup:
    """Layers down, experts across; a cell's colour is its load relative to an even share, full at `top` times.

    `counts` maps a layer to tokens per expert; layers may differ in their number of experts.
    """
    left, head, row = 34, 16, 22
    experts = max(len(loads) for loads in counts.values())
    width = (WIDTH - left) / experts
    parts = []
    for number in range(0, experts, max(1, experts // 16)):
        x = left + (number + 0.5) * width
        parts.append(Markup('<text x="{:.1f}" y="11" class="mid soft">{}</text>').format(x, number))
    for line, (layer, loads) in enumerate(counts.items()):
        y, even = head + line * row, sum(loads) / len(loads) or 1.0
        parts.append(Markup('<text x="{}" y="{}" class="end">L{}</text>').format(left - 6, y + row / 2 + 4, layer))
        for expert, load in enumerate(loads):
            name = f"layer {layer}, expert {expert}"
            parts.append(_cell(left + expert * width, y, width, row, load, load / even, top, name))
    return svg(parts, head + row * len(counts) + 2, label)


def _cell(x: float, y: float, width: float, height: float, load: int, share: float, top: float, name: str) -> Markup:
    gap = 1.5 if width > 8 else 0.3
    shade = min(share / top, 1.0)
    box = Markup(
        '<rect class="box" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" fill-opacity="{:.2f}">'
        "<title>{}: {:,} tokens, {:.2f} x an even share</title></rect>"
    ).format(x, y, width - gap, height - gap, shade, name, load, share)
    if width < 20:
        return box
    text = Markup('<text x="{:.1f}" y="{:.1f}" class="mid {}">{}</text>')
    ink = "on" if shade > 0.55 else ""
    return box + text.format(x + (width - gap) / 2, y + height / 2 + 3.2, ink, f"{share:.1f}")


def wave(envelope: Sequence[float], *, label: str) -> Markup:
    """The outline of a sound: peaks in [0, 1], left to right."""
    height, step = 64, WIDTH / len(envelope)
    bars = (
        Markup('<rect class="wave" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1"/>').format(
            i * step, (height - tall) / 2, 0.7 * step, tall
        )
        for i, tall in enumerate(max(1.5, peak * (height - 4)) for peak in envelope)
    )
    return svg(list(bars), height, label)


def svg(parts: Sequence[Markup], height: float, label: str) -> Markup:
    """A drawing of the charts' width. `label` says what it shows to a screen reader."""
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(WIDTH, height, label)
    return head + Markup("").join(parts) + Markup("</svg>")


def spell(value: float) -> str:
    """A number in at most six characters: 0, 3e-4, 0.0012, 0.25, 12.5, 1.2k, 3.4M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    if 0 < abs(value) < 0.9995e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.3g}"
