"""`mm shard SOURCE --out DIR`: files of many formats -> shards that `mm fit` streams."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mm.arguments import Parser
from mm.datasets.catalog import defaults, helps, open_source
from mm.datasets.decontaminate import Decontaminate
from mm.datasets.dedupe import Dedupe
from mm.datasets.features import FeatureMaker
from mm.datasets.manifest import MANIFEST, UNFINISHED, read_manifest
from mm.datasets.shard_index import index_shards
from mm.datasets.shards import described, remove_shards, write_shards
from mm.datasets.steps import Filter, Part, Step, from_options
from mm.datasets.transforms import Transform

SHARD_BYTES = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """`mm shard` without --features, which need a model (`mm.shard`)."""
    return execute(parser().parse_args(argv))


def execute(arguments: argparse.Namespace, features: FeatureMaker | None = None) -> int:
    """Runs `mm shard`. Raises ValueError and OSError for what a user can mend; `mm.cli` prints those as one line."""
    console = Console(stderr=True)
    if arguments.index is not None:
        return _index(arguments, console)
    for name in ("source", "out"):
        if getattr(arguments, name) is None:
            raise ValueError(f"{name} is missing: mm shard SOURCE --out DIR, or mm shard --index DIR")
    return run(arguments, console, features)


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<15}  {line}" for name, line in helps().items())
    result = Parser(
        "mm shard",
        "Write samples from files or packages into WebDataset shards with an index and a manifest.",
        usage="mm shard SOURCE --out DIR [options]\n       mm shard --index DIR",
        notes=f"sources:\n{listed}\n\nkeys of --filter: {', '.join(Filter.__dataclass_fields__)}\n"
        f"keys of --transform: {', '.join(Transform.__dataclass_fields__)}\n\n"
        "The output is the same for any number of workers; an interrupted run goes on where it stopped. What is left "
        "out is listed in DIR/removed.jsonl, what is broken in DIR/quarantine.jsonl.",
        examples=[
            "mm shard folder:photos --out shards/photos --workers 8",
            "mm shard llava:chat.json --set images=photos --out shards/chat --filter min_side=64 --dedupe exact",
        ],
    )
    add = result.add_argument
    add("source", nargs="?", metavar="SOURCE", help="NAME, NAME:PATH, or a path whose format is recognised")
    add("--out", type=Path, metavar="DIR", help="folder of the shards")
    add("--index", nargs="?", const="", metavar="DIR", help="instead: index WebDataset tars that lie in DIR")
    add(
        "--workers",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (%(default)s)",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="this machine, or a Ray cluster (%(default)s)",
    )
    add("--seed", type=int, metavar="S", help="seed of the source, where it has one")
    add("--split", metavar="S", help="train, test, ...: as the source offers")
    add("--limit", type=_positive, metavar="N", help="only the first N records")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the source; repeatable")
    add(
        "--samples-per-shard",
        type=_positive,
        default=500,
        metavar="N",
        help="samples of a shard, at most (%(default)s)",
    )
    add(
        "--shard-bytes",
        type=_positive,
        default=SHARD_BYTES,
        metavar="N",
        help="bytes of a shard, at most (%(default)s)",
    )
    _add_steps(result.add_argument_group("what stays, and as what"))
    add(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="RATE",
        help="share of broken records to tolerate (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace the shards that DIR holds")
    add("--quiet", action="store_true", help="no progress bar")
    return result


def _add_steps(group: Any) -> None:
    add = group.add_argument
    add("--part", type=_part, metavar="FROM:TO", help="samples whose id hashes into this part of 0 to 1: 0:0.9, 0.9:1")
    add("--part-by", metavar="KEY", help="the id is this key of meta (default: the sample's key)")
    add("--filter", action="append", default=[], metavar="KEY=VALUE", help="a limit that samples must keep; repeatable")
    add("--transform", action="append", default=[], metavar="KEY=VALUE", help="re-encode media; repeatable")
    add("--dedupe", metavar="KINDS", help="leave out what came before: exact, images, text, with commas between")
    add(
        "--image-distance",
        type=int,
        default=3,
        metavar="BITS",
        help="in which alike images may differ (%(default)s)",
    )
    add("--text-similarity", type=float, default=0.8, metavar="J", help="of alike texts, Jaccard (%(default)s)")
    help_text = "leave out what this evaluation set holds: a folder of shards or a SOURCE; repeatable"
    add("--decontaminate", action="append", default=[], metavar="SET", help=help_text)
    add("--ngram", type=int, default=13, metavar="N", help="words in a row that count as held (%(default)s)")


def run(arguments: argparse.Namespace, console: Console, features: FeatureMaker | None = None) -> int:
    options = _options(arguments)
    source = open_source(arguments.source, **dict(options))
    steps, dedupe = _steps(arguments), _dedupe(arguments)
    settings = {"source": arguments.source, "options": options}
    sizes = {"samples_per_shard": arguments.samples_per_shard, "limit": arguments.limit}
    made_by = {} if features is None else {"features": features.describe()}
    out: Path = arguments.out
    if arguments.overwrite:
        remove_shards(out)
    elif (out / MANIFEST).exists():
        manifest = read_manifest(out)
        found = {key: manifest[key] for key in ("fingerprint", "features") if key in manifest} | manifest["settings"]
        wanted = {**settings, **sizes, **described(steps, dedupe, arguments.shard_bytes), **made_by}
        differing = _differing(found, {**wanted, "fingerprint": source.fingerprint()})
        if differing:
            raise ValueError(f"{out}: holds shards of other settings ({differing}); use another DIR or --overwrite")
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # a run killed after its manifest leaves it
        console.print(f"{out}: {manifest['samples']:,} samples are there already, from the same settings: kept")
        return 0
    total = len(source) if hasattr(source, "__len__") else None  # type: ignore[arg-type]
    if total is not None and arguments.limit is not None:
        total = min(total, arguments.limit)
    with _progress(arguments, console, total) as advance:
        manifest = write_shards(
            source,
            out,
            **sizes,
            shard_bytes=arguments.shard_bytes,
            workers=arguments.workers,
            engine=arguments.engine,
            steps=steps,
            dedupe=dedupe,
            features=features,
            max_bad=arguments.max_bad,
            settings=settings,
            progress=advance,
        )
    _tell(out, manifest, console)
    return 0


def _index(arguments: argparse.Namespace, console: Console) -> int:
    named = [name for name in (arguments.index, arguments.source) if name]
    if len(named) != 1 or arguments.out is not None:
        raise ValueError("--index takes one folder of tars, and writes beside them: mm shard --index DIR")
    with _progress(arguments, console, None) as advance:
        manifest = index_shards(Path(named[0]), workers=arguments.workers, engine=arguments.engine, progress=advance)
    _tell(Path(named[0]), manifest, console)
    return 0


def _tell(out: Path, manifest: dict[str, Any], console: Console) -> None:
    counted = ", ".join(f"{count:,} {kind}" for kind, count in manifest["media"].items() if count)
    console.print(
        f"{out}: {manifest['samples']:,} samples ({counted or 'text only'}) in {len(manifest['shards'])} shards, "
        f"{manifest['bytes'] / 1e6:,.1f} MB"
    )
    for reason, count in sorted(manifest.get("removed", {}).items(), key=lambda item: -item[1]):
        console.print(f"  removed: {count:,} {reason}")
    if manifest.get("quarantined"):
        console.print(f"  [yellow]broken: {manifest['quarantined']:,}[/], see {out / 'quarantine.jsonl'}")


@contextmanager
def _progress(arguments: argparse.Namespace, console: Console, total: int | None) -> Iterator[Any]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=arguments.quiet or not console.is_terminal) as progress:
        task = progress.add_task(str(arguments.source or arguments.index), total=total)
        yield lambda done: progress.advance(task, done)


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


def _steps(arguments: argparse.Namespace) -> list[Step]:
    """In the order in which they are least work: what needs no media first, what changes media last."""
    steps: list[Step | None] = []
    if arguments.part is not None:
        steps.append(Part(*arguments.part, by=arguments.part_by))
    elif arguments.part_by is not None:
        raise ValueError("--part-by needs --part FROM:TO")
    steps.append(from_options(Filter, arguments.filter, "--filter"))
    if arguments.decontaminate:
        steps.append(Decontaminate(tuple(arguments.decontaminate), arguments.ngram, arguments.image_distance))
    steps.append(from_options(Transform, arguments.transform, "--transform"))
    return [step for step in steps if step is not None]


def _dedupe(arguments: argparse.Namespace) -> Dedupe | None:
    if arguments.dedupe is None:
        return None
    kinds = tuple(kind.strip() for kind in arguments.dedupe.split(",") if kind.strip())
    return Dedupe(kinds, arguments.image_distance, arguments.text_similarity)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return ", ".join(f"{key}: {one.get(key)!r}, now {other.get(key)!r}" for key in keys)


def _part(text: str) -> tuple[float, float]:
    start, _, stop = text.partition(":")
    try:
        return float(start), float(stop)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected FROM:TO, such as 0:0.9, got {text!r}") from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
