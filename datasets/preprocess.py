"""`mm shard SOURCE --out DIR`: files of many formats -> shards that `mm fit` streams."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mm.datasets.catalog import defaults, names, open_source
from mm.datasets.shards import MANIFEST, read_manifest, remove_shards, write_shards


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mm shard` and returns its exit status: 0, or 2 after one line on stderr that says what is wrong."""
    arguments = parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        return run(arguments, console)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"mm shard: {message}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<15} {line}" for name, line in names().items())
    result = argparse.ArgumentParser(
        prog="mm shard",
        description="Writes samples from files or packages into WebDataset shards with an index and a manifest.",
        epilog=f"sources:\n{listed}\n\nThe output is the same for any number of workers; an interrupted run goes on "
        "where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("source", metavar="SOURCE", help="NAME, NAME:PATH, or a path whose format is recognised")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the shards")
    add("--workers", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (%(default)s)")
    add("--seed", type=int, metavar="S", help="seed of a generated source")
    add("--split", metavar="S", help="train, test, ...: as the source offers")
    add("--samples-per-shard", type=_positive, default=500, metavar="N", help="%(default)s")
    add("--limit", type=_positive, metavar="N", help="only the first N samples")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the source; repeatable")
    add("--overwrite", action="store_true", help="replace the shards that DIR holds")
    add("--quiet", action="store_true", help="no progress bar")
    return result


def run(arguments: argparse.Namespace, console: Console) -> int:
    options = _options(arguments)
    source = open_source(arguments.source, **dict(options))
    settings = {"source": arguments.source, "options": options}
    wanted = {**settings, "samples_per_shard": arguments.samples_per_shard, "limit": arguments.limit}
    out: Path = arguments.out
    if arguments.overwrite:
        remove_shards(out)
    elif (out / MANIFEST).exists():
        manifest = read_manifest(out)
        found = {**manifest["settings"], "fingerprint": manifest["fingerprint"]}
        differing = _differing(found, {**wanted, "fingerprint": source.fingerprint()})
        if differing:
            raise ValueError(f"{out}: holds shards of other settings ({differing}); use another DIR or --overwrite")
        console.print(f"{out}: {manifest['samples']:,} samples are there already, from the same settings: kept")
        return 0
    manifest = _write(source, arguments, settings, console)
    counted = ", ".join(f"{count:,} {kind}" for kind, count in manifest["media"].items() if count)
    console.print(
        f"{out}: {manifest['samples']:,} samples ({counted or 'text only'}) in {len(manifest['shards'])} shards, "
        f"{manifest['bytes'] / 1e6:,.1f} MB"
    )
    return 0


def _write(source: Any, arguments: argparse.Namespace, settings: dict[str, Any], console: Console) -> dict[str, Any]:
    total = len(source) if hasattr(source, "__len__") else None
    if total is not None and arguments.limit is not None:
        total = min(total, arguments.limit)
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=arguments.quiet or not console.is_terminal) as progress:
        task = progress.add_task(arguments.source, total=total)
        return write_shards(
            source,
            arguments.out,
            samples_per_shard=arguments.samples_per_shard,
            workers=arguments.workers,
            limit=arguments.limit,
            settings=settings,
            progress=lambda done: progress.advance(task, done),
        )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options given for the source: --set, --seed and --split."""
    options: dict[str, Any] = {}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {text!r}: write KEY=VALUE")
        options[key] = value
    offered = defaults(arguments.source)
    for key in ("seed", "split"):
        value = getattr(arguments, key)
        if value is None:
            continue
        if key not in offered:
            raise ValueError(f"--{key}: source {arguments.source} has no {key}; it has: {', '.join(offered)}")
        options[key] = value
    return options


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return ", ".join(f"{key}: {one.get(key)!r}, now {other.get(key)!r}" for key in keys)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
