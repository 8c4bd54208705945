"""`mm compare RUN_A RUN_B`: is B better than A, or is it luck? Paired tests on the samples that both answered."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mm.arguments import Parser
from mm.evaluation import results
from mm.evaluation.records import Record
from mm.evaluation.statistics import Paired, paired

# What may differ between two runs without a word: where, when and how fast, and the names of files.
SILENT = ("seconds", "model.path", "batch_size", "ranks", "dataset.origin", "config")


@dataclass(frozen=True)
class Comparison:
    """One benchmark of two runs: means of the samples' scores, the paired test, what else differs between the runs."""

    benchmark: str
    n: int
    a: float
    b: float
    paired: Paired
    differences: dict[str, tuple[Any, Any]]


def main(argv: Sequence[str]) -> int:
    """Prints the comparison. Raises ValueError naming what cannot be compared."""
    parser = Parser(
        "mm compare",
        "Test whether one run's scores are better than another's, question by question, on the benchmarks of both.",
        examples=["mm compare runs/a runs/b", "mm compare runs/a runs/b --benchmark mmmu --json"],
    )
    parser.add_argument("a", type=Path, metavar="RUN_A", help="a run, its results folder, or one result file")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="another one")
    parser.add_argument("--benchmark", action="append", metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    found = compare(options.a, options.b, options.benchmark)
    if options.json:
        print(json.dumps([asdict(comparison) for comparison in found], indent=2, default=str))
    else:
        show(Console(), found)
    return 0


def compare(a: Path, b: Path, names: Sequence[str] | None = None) -> list[Comparison]:
    """The benchmarks that both runs have, in the order of names.

    Raises ValueError if there is none, a named one is missing, or the two did not answer the same questions.
    """
    first, second = result_files(a), result_files(b)
    common = sorted(first.keys() & second.keys())
    for name in names or ():
        for where, files in ((a, first), (b, second)):
            if name not in files:
                raise ValueError(f"{where}: no result of {name!r}; there is {', '.join(sorted(files)) or 'none'}")
    if not common:
        raise ValueError(f"{a} ({', '.join(sorted(first))}) and {b} ({', '.join(sorted(second))}) share no benchmark")
    return [compare_files(first[name], second[name]) for name in (names or common)]


def result_files(path: Path) -> dict[str, Path]:
    """{benchmark: result file} of a run, of its results folder, or of one file. Raises ValueError for anything else."""
    if path.is_file():
        return {str(results.read_result(path)["benchmark"]): path}
    folder = path / "results" if (path / "results").is_dir() else path
    files = sorted(file for file in folder.glob("*.json") if file.with_suffix(".predictions.jsonl").is_file())
    if not files:
        raise ValueError(f"{path}: no results of an evaluation (NAME.json with NAME.predictions.jsonl)")
    return {file.stem: file for file in files}


def compare_files(a: Path, b: Path) -> Comparison:
    first, second = results.read_result(a), results.read_result(b)
    if first["benchmark"] != second["benchmark"]:
        raise ValueError(f"{a} is of {first['benchmark']!r}, {b} of {second['benchmark']!r}")
    before, after = (_scored(file) for file in (a, b))
    for where, missing in ((b, before.keys() - after.keys()), (a, after.keys() - before.keys())):
        if missing:
            raise ValueError(
                f"{where}: no prediction for {min(missing)!r}, which the other run has ({len(missing)} such ids)"
            )
    for key, record in before.items():
        if record.answers != after[key].answers or record.question != after[key].question:
            raise ValueError(f"{a} and {b}: {key!r} is another question, or has other answers: not the same data")
    old, new = ([run[key].score for key in before] for run in (before, after))
    count = len(before)
    differences = provenance_differences(first["provenance"], second["provenance"])
    return Comparison(
        first["benchmark"], count, math.fsum(old) / count, math.fsum(new) / count, paired(old, new), differences
    )


def _scored(file: Path) -> dict[str, Record]:
    records = results.read_records(file.with_suffix(".predictions.jsonl"))
    for record in records:
        if math.isnan(record.score):
            raise ValueError(f"{file}: {record.id!r} has no score: its answers are hidden")
    return {record.id: record for record in records}


def provenance_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: both values} of what differs and may matter."""
    return dict(_differences(a, b))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Keys of nested mappings, dotted, whose values differ."""
    for key in dict.fromkeys((*a, *b)):
        name = f"{path}{key}"
        x, y = a.get(key), b.get(key)
        if x == y or name in SILENT:
            continue
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from _differences(x, y, f"{name}.")
        else:
            yield name, (x, y)


def show(console: Console, found: Sequence[Comparison]) -> None:
    table = Table(title="B against A: mean score of the same samples")
    for heading in ("benchmark", "A", "B", "B - A", "95 %", "A better", "B better", "p"):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right")
    for one in found:
        test = one.paired
        table.add_row(
            f"{one.benchmark} ({one.n:,})",
            f"{100 * one.a:.2f}",
            f"{100 * one.b:.2f}",
            f"{100 * test.difference:+.2f}",
            f"{100 * test.low:+.2f} to {100 * test.high:+.2f}",
            str(test.a_better),
            str(test.b_better),
            f"{test.p_value:.4f}",
        )
    console.print(table)
    for one in found:
        console.print(f"{one.benchmark}: p by {one.paired.test}", style="dim", highlight=False)
        for name, (x, y) in one.differences.items():
            console.print(
                f"{one.benchmark}: {name} differs: {x!r} and {y!r}", highlight=False, soft_wrap=True, markup=False
            )
