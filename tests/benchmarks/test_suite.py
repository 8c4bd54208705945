"""The suite's comparison and table, and the page of scaling: on made-up figures, and on those that are kept."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark script by name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("suite", "common", "scaling", "scaling_page"):  # common names: nobody else shall find them
        sys.modules.pop(name, None)


def row(scripts: Any, ratio: float | None, **changes: Any) -> dict[str, Any]:
    fields = {"what": "a step", "run": "mm", "rate": 1.0, "unit": "steps/s", "noise": 0.02, "peer": "theirs",
              "ratio": ratio, "judged": "ratio", "floor": 1.0, "goal": 2.0}  # fmt: skip
    return asdict(scripts("common").Row(**fields | changes))


@pytest.mark.parametrize(
    "now,noise,fallen",
    [(2.0, 0.02, False), (1.8, 0.02, False), (1.7, 0.02, True), (1.5, 0.1, True), (1.6, 0.1, False), (1.0, 9.0, True)],
)
def test_a_ratio_may_fall_by_the_tolerance_and_the_noise(scripts: Any, now: float, noise: float, fallen: bool) -> None:
    """0.1 of it, and the noise of both runs, of which no run has more than 0.15."""
    before = {"rows": [row(scripts, 2.0)]}
    complaints = scripts("suite").fallen({"rows": [row(scripts, now, noise=noise)]}, before)
    assert bool(complaints) == fallen
    assert all("2.00 -> " in complaint for complaint in complaints)


def test_times_are_not_compared_and_missing_figures_are(scripts: Any) -> None:
    suite = scripts("suite")
    before = {"rows": [row(scripts, 2.0, rate=100.0), row(scripts, None, what="a limit", judged="")]}
    assert suite.fallen({"rows": [row(scripts, 2.0, rate=1.0)]}, before) == []
    assert "no figure any more" in suite.fallen({"rows": []}, before)[0]
    assert "no figure any more" in suite.fallen({"rows": [row(scripts, 2.0, peer="others")]}, before)[0]


def test_the_table_replaces_what_stood_between_its_marks(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = scripts("suite")
    file, kept = tmp_path / "RESULTS.md", tmp_path / "results"
    kept.mkdir()
    monkeypatch.setattr(suite, "RESULTS", file)
    monkeypatch.setattr(suite, "KEPT", kept)
    file.write_text(f"before\n{suite.BEGIN}\nold\n{suite.END}\nafter\n")
    figures = {"about": {"cpu": "a processor"}, "rows": [row(scripts, 1.5), row(scripts, 0.5), row(scripts, 2.5)]}
    (kept / "moe.json").write_text(json.dumps(figures))
    for _ in range(2):  # made anew, it is the same
        suite.write_table()
        text = file.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("### moe") == 1 and "a processor" in text
        assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| a step")] == [
            "floor met", "MISSED", "goal met",
        ]  # fmt: skip


def test_every_benchmark_of_the_suite_is_there(scripts: Any) -> None:
    assert [name for name in scripts("suite").SUITE if not (FOLDER / f"{name}.py").exists()] == []


def test_a_slope_and_its_interval(scripts: Any) -> None:
    fit = scripts("scaling").fit
    exact = fit([1.0, 2.0, 4.0, 8.0], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert exact.slope == pytest.approx(1.5) and exact.half == pytest.approx(0, abs=1e-6)
    # By hand: x = 0, 1, 2 and y = 0, 1, 1 (in powers of e): slope 1/2, residuals 1/6, -1/3, 1/6, 1 degree of freedom.
    found = fit([1.0, 2.718281828, 7.389056099], [1.0, 2.718281828, 2.718281828])
    assert found.slope == pytest.approx(0.5) and found.half == pytest.approx(12.71 * (1 / 12) ** 0.5, rel=1e-3)
    with pytest.raises(ValueError, match="three points"):
        fit([1.0, 2.0], [1.0, 2.0])


def test_the_page_is_what_its_figures_say(scripts: Any) -> None:
    docs = FOLDER.parent / "docs"
    page = scripts("scaling_page").page(json.loads((docs / "scaling.json").read_text()))
    assert (docs / "scaling.md").read_text(encoding="utf-8") == page, "run benchmarks/scaling.py --page"
