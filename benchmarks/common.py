"""What the speed benchmarks share: alternatives timed in turn, one table with the peer and the limit, JSON beside it.

A figure is a median; its noise is the distance between the quartiles as a share of it. Ratios are of medians, so that
they outlive the machine; times do not.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

CALL = 0.01  # seconds that a timed call takes at least: shorter ones are repeated


@dataclass(frozen=True)
class Row:
    """One line: `run` did `what` at `rate` (of `unit`), `ratio` times as fast as `peer`, at `share` of a limit.

    `floor` and `goal` are of `judged`, the ratio or the share; without them the line is there to compare with.
    """

    what: str
    run: str
    rate: float
    unit: str
    noise: float
    peer: str = ""
    ratio: float | None = None
    limit: str = ""
    share: float | None = None
    judged: str = ""
    floor: float | None = None
    goal: float | None = None

    @property
    def found(self) -> float | None:
        return self.ratio if self.judged == "ratio" else self.share if self.judged == "share" else None

    @property
    def verdict(self) -> str:
        if self.floor is None or self.found is None:
            return ""
        met = "goal met" if self.goal is not None and self.found >= self.goal else "floor met"
        return met if self.found >= self.floor else "MISSED"


HEAD = (
    "| what | run | rate | noise | ratio | of the limit | floor / goal | |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x {row.peer}"
    share = "" if row.share is None else f"{row.share:.2f} of {row.limit}"
    goals = "" if row.floor is None else " / ".join(f"{x:g}" for x in (row.floor, row.goal) if x is not None)
    rate = f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.3g}"
    cells = (row.what, row.run, f"{rate} {row.unit}", f"{row.noise:.0%}", ratio, share, goals, row.verdict)
    return f"| {' | '.join(cells)} |"


class Bench:
    """One script: its arguments, its clock, its rows.

    bench = Bench(__doc__);  bench.add(...) for each row;  sys.exit(bench.end())
    """

    device = torch.device("cpu")

    def __init__(
        self,
        doc: str | None,
        *extra: Callable[[argparse.ArgumentParser], object],
        argv: Sequence[str] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for shared machines")
        parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own choice)")
        parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default: %(default)s)")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
        for add in extra:
            add(parser)
        self.args = parser.parse_args(argv)
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        self.clock = self.choose_clock()
        self.rows: list[Row] = []
        print(", ".join(f"{name} {value}" for name, value in self.about().items()), flush=True)
        print(HEAD, flush=True)

    def choose_clock(self) -> Callable[[], float]:
        return time.process_time if self.args.clock == "cpu" else time.perf_counter

    def about(self) -> dict[str, Any]:
        versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers")}
        return {
            "cpu": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "clock": self.args.clock, "date": str(date.today()), **versions,
        }  # fmt: skip

    def times(
        self, calls: Mapping[str, Callable[[], object]], warmup: int = 2, repeats: int | None = None
    ) -> dict[str, tuple[float, float]]:
        """name -> (median seconds, noise), all of them in turn each round. Each is repeated to last CALL seconds."""
        inner: dict[str, int] = {}
        for name, call in calls.items():
            for _ in range(warmup):
                call()
            start = self.clock()
            call()
            inner[name] = max(1, int(CALL / max(self.clock() - start, 1e-6)))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats or self.args.repeats):
            for name, call in calls.items():
                gc.collect()
                start = self.clock()
                for _ in range(inner[name]):
                    call()
                taken[name].append((self.clock() - start) / inner[name])
        return {name: (statistics.median(each), spread(each)) for name, each in taken.items()}

    def add(self, **fields: Any) -> None:
        row = Row(**fields)
        self.rows.append(row)
        print(line(row), flush=True)

    def note(self, text: str) -> None:
        print(f"note: {text}", flush=True)

    def end(self) -> int:
        """Writes the JSON; returns 1 if a floor was missed."""
        if self.args.json is not None:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            rows = [asdict(row) for row in self.rows]
            self.args.json.write_text(json.dumps({"about": self.about(), "rows": rows}, indent=1) + "\n")
        return int(any(row.verdict == "MISSED" for row in self.rows))


def in_turn(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds of each, medians of seven rounds after one that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(8):
        for name, work in ways.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles, as a share of the median."""
    if len(values) < 3:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself; where it does not, goals in it are not judged."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _processor() -> str:
    if sys.platform == "linux":
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()
