"""Every speed figure that has a floor: `make bench` runs them, `make bench-check` compares them with those of before.

    python benchmarks/suite.py [NAME ...] [--clock cpu --threads 1] [--check]
    python benchmarks/suite.py --gpu

Each benchmark is a script of its own, run one after the other, whose figures are kept in benchmarks/results/NAME.json;
the table "Speed" of benchmarks/RESULTS.md is made of those files. --check writes nothing: it runs them again and fails
where a ratio, or a share of a limit, has fallen by more than its noise and TOLERANCE. Ratios are compared, never times.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import HEAD, Row, line

HERE = Path(__file__).resolve().parent
RESULTS, KEPT = HERE / "RESULTS.md", HERE / "results"
BEGIN, END = "<!-- made by benchmarks/suite.py: begin -->", "<!-- made by benchmarks/suite.py: end -->"
# Of the ratio, beside the noise of both runs: what two runs of one tree have differed by on a shared machine, where a
# neighbour slows what reads memory more than what computes. Noise is counted to NOISE: more says nothing of speed.
TOLERANCE, NOISE = 0.1, 0.15
SUITE: dict[str, list[str]] = {
    "machine": [],
    "moe": ["--repeats", "5"],
    "attention": ["--repeats", "3"],
    "decode": ["--repeats", "3", "--caches", "static", "--dtypes", "float32,bfloat16"],
    "train_step": ["--repeats", "5"],
    "encoders": ["--repeats", "3"],
    "images": [],
    "audio_video": ["--repeats", "3"],
    "reading": ["--repeats", "5"],
    "packing": ["--samples-per-batch", "32", "128"],
    "end_to_end": [],
}

GPU = [f"gpu/{name}" for name in ("mfu", "moe_layer", "packed_attention", "decode_step", "packed_rows", "parity")]


def kept(name: str) -> Path:
    return KEPT / f"{name.replace('/', '_')}.json"


def run(name: str, clock: list[str], to: Path) -> dict[str, Any] | None:
    """The figures of one benchmark and the seconds that it took, or None if it did not end."""
    print(f"\n## {name}", flush=True)
    file, start = to / kept(name).name, time.perf_counter()
    options = SUITE.get(name, [])
    subprocess.run([sys.executable, HERE / f"{name}.py", *options, *clock, "--json", file], check=False)
    if not file.exists():
        return None
    return json.loads(file.read_text()) | {"seconds": round(time.perf_counter() - start, 1)}


def fallen(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What is slower than it was, against the same peer or limit. A figure that is gone counts too."""
    found = {_key(row): Row(**row) for row in new["rows"]}
    complaints = []
    for row in old["rows"]:
        before, now = Row(**row), found.get(_key(row))
        if before.found is None:
            continue
        if now is None or now.found is None:
            complaints.append(f"{before.what}, {before.run}: no figure any more")
            continue
        allowed = TOLERANCE + min(before.noise, NOISE) + min(now.noise, NOISE)
        if now.found < before.found * (1 - allowed):
            complaints.append(
                f"{now.what}, {now.run}: {before.judged} {before.found:.2f} -> {now.found:.2f}, more than {allowed:.0%}"
            )
    return complaints


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["what"], row["run"], row["peer"], row["limit"]


def write_table() -> None:
    """Makes the table of RESULTS.md anew from all figures that are kept; what no GPU has measured yet is listed so."""
    parts = []
    for name in [*SUITE, *GPU]:
        if (file := kept(name)).exists():
            found = json.loads(file.read_text())
            about = ", ".join(f"{key} {value}" for key, value in found["about"].items()) + "\n\n"
            rows = "\n".join(line(Row(**row)) for row in found["rows"])
        elif name in GPU:
            about, rows = "", "\n".join(_unmeasured(name))
        else:
            continue
        parts.append(f"### {name} (`benchmarks/{name}.py`)\n\n{about}{HEAD}\n{rows}\n")
    text = RESULTS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    RESULTS.write_text(f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}", encoding="utf-8")


def _unmeasured(name: str) -> list[str]:
    """The goals of a GPU's script, which its GOALS says."""
    folder = str(HERE / "gpu")
    if folder not in sys.path:
        sys.path.append(folder)
    goals = importlib.import_module(name.removeprefix("gpu/")).GOALS or {"all of it": ()}
    return [f"| {what} | not yet measured | | | | | {' / '.join(map(str, goal))} | |" for what, goal in goals.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITE)} (default: all)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", metavar="N")
    parser.add_argument("--check", action="store_true", help="compare with the figures that are kept")
    parser.add_argument("--gpu", action="store_true", help=f"on one GPU: {', '.join(GPU)}")
    args = parser.parse_args()
    if unknown := set(args.names) - {*SUITE, *GPU}:
        parser.error(f"no benchmark {min(unknown)}; there are {', '.join([*SUITE, *GPU])}")
    clock = ["--clock", args.clock, *(["--threads", args.threads] if args.threads else [])]
    failures: list[str] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or (GPU if args.gpu else SUITE):
            found = run(name, clock, Path(folder))
            if found is None:
                failures.append(f"{name}: it did not end")
            elif not args.check:
                KEPT.mkdir(exist_ok=True)
                kept(name).write_text(json.dumps(found, indent=1) + "\n")
                rows = [Row(**row) for row in found["rows"]]
                failures += [f"{row.what}, {row.run}: {line(row)}" for row in rows if row.verdict == "MISSED"]
            elif not kept(name).exists():
                failures.append(f"{name}: nothing to compare with; run it without --check first")
            else:
                failures += fallen(found, json.loads(kept(name).read_text()))
    if not args.check:
        write_table()
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")
    for failure in failures:
        print("FAILED" if args.check else "missed:", failure)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
