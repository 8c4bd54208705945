"""What the checks of `mm doctor` say, for a reader and for a program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

Status = Literal["ok", "warn", "fail"]
SIGNS: dict[Status, tuple[str, str]] = {
    "ok": ("ok  ", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "bold red"),
}
BAR = 40  # characters


@dataclass(frozen=True)
class Finding:
    """One check and how it went; `fail` means: do not train."""

    check: str
    status: Status
    message: str


@dataclass(frozen=True)
class Histogram:
    """Counts of values; bin i holds [edges[i], edges[i + 1]), the last one its upper edge too."""

    name: str
    unit: str
    edges: list[float]
    counts: list[int]

    @staticmethod
    def of(name: str, unit: str, values: Iterable[float], bins: int = 10) -> Histogram:
        """Equal bins from the least to the greatest value; one where they are the same."""
        import numpy as np

        data = np.asarray(list(values), np.float64)
        if not len(data):
            return Histogram(name, unit, [], [])
        counts, edges = np.histogram(data, 1 if data.min() == data.max() else bins)
        return Histogram(name, unit, [round(float(edge), 3) for edge in edges], counts.tolist())


def all_well(findings: Iterable[Finding]) -> bool:
    return all(finding.status != "fail" for finding in findings)


def show(console: Console, finding: Finding) -> None:
    sign, style = SIGNS[finding.status]
    console.print(Text.assemble((sign, style), "  ", (finding.check, "bold"), "  ", finding.message))


def show_histogram(console: Console, histogram: Histogram) -> None:
    if not histogram.counts:
        return
    console.print(Text(f"\n{histogram.name} ({histogram.unit})", style="bold"))
    most = max(histogram.counts)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        bar = "█" * round(BAR * count / most) if count else ""
        console.print(f"  {low:>10,g} to {high:>10,g}  {count:>8,}  {bar}", highlight=False, markup=False)


def as_json(findings: list[Finding], histograms: list[Histogram], about: dict[str, Any]) -> dict[str, Any]:
    return {
        "ok": all_well(findings),
        **about,
        "findings": [asdict(finding) for finding in findings],
        "histograms": [asdict(histogram) for histogram in histograms],
    }


def plot(histograms: list[Histogram], path: str) -> None:
    """One picture with a panel a histogram (PNG, SVG or PDF, by the name)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [histogram for histogram in histograms if histogram.counts]
    figure, axes = plt.subplots(max(1, len(shown)), 1, figsize=(7, 2.2 * max(1, len(shown))), squeeze=False)
    for axis, histogram in zip(axes[:, 0], shown, strict=False):
        widths = [max(high - low, 1e-9) for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)]
        axis.bar(histogram.edges[:-1], histogram.counts, width=widths, align="edge")
        axis.set(title=histogram.name, xlabel=histogram.unit, ylabel="samples")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
