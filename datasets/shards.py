"""Shards: samples as plain WebDataset tars, with an index per shard and a manifest that says what all of it is.

    DIR/shard-000000.tar        key.json, key.0.png, key.1.wav, ... per sample; any WebDataset reader reads it;
                                key.0.features.safetensors where they were asked for (`mm.datasets.features`)
    DIR/shard-000000.index.npy  (S,) of INDEX_DTYPE: key, offset, length and CRC-32 of each sample's run of members
    DIR/removed.jsonl           record, key, reason, detail of each sample that a step left out, if any
    DIR/quarantine.jsonl        record, key, cause of each sample that could not be made, if any
    DIR/manifest.json           counts, SHA-256 of every file, source, settings, versions; its presence means "complete"

The records of the source are cut into chunks, each the work of one process; what it makes stands in DIR/.unfinished
until all are done (`mm.datasets.shard_work`). Then the pieces get their final names, and the manifest comes last. Every
file is written beside its name, fsynced and renamed, so a killed run leaves no half file under a final name, and the
next one keeps what it finished.
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import mm
from mm.datasets.dedupe import Dedupe, decide
from mm.datasets.engines import Engine, run_ordered
from mm.datasets.features import FeatureMaker
from mm.datasets.manifest import MANIFEST, UNFINISHED, repeated_key, to_json, write_manifest
from mm.datasets.shard_format import TAR_END, read_index, sync_folder, write_file
from mm.datasets.shard_work import Job, Piece, index_bytes, merged, scan_chunk, write_chunk
from mm.datasets.source import Samples, Source, sha256_file
from mm.datasets.steps import Step
from mm.types import KINDS, Sample

STARTED = "settings.json"  # in UNFINISHED: what is being written
COMPLETE = "complete.json"  # in UNFINISHED: all pieces are there; they are being given their names
REPORTS = {"removed": "removed.jsonl", "quarantined": "quarantine.jsonl"}
GRACE = 1_000  # records before the rate of bad ones can stop a run early


def write_shards(
    samples: Iterable[Sample] | Source[Any],
    out: Path | str,
    *,
    samples_per_shard: int = 500,
    shard_bytes: int = 2**30,
    workers: int = 1,
    engine: Engine = "local",
    limit: int | None = None,
    steps: Sequence[Step] = (),
    dedupe: Dedupe | None = None,
    features: FeatureMaker | None = None,
    max_bad: float = 0.0,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Writes samples, in their order, into shards under `out` and returns the manifest.

    The bytes depend neither on `workers` (processes; 1 works in this one) nor on the engine. What an interrupted run
    with the same settings has finished is verified and kept.

    Args:
        samples_per_shard: at most so many samples a shard; fewer where steps remove some.
        shard_bytes: at most so many bytes a shard, unless a single sample has more.
        steps: what is done with each sample, in this order. The samples are made twice where there is `dedupe` too.
        features: gives each sample, as the steps leave it, the features of its media.
        max_bad: the share of records that may be bad (ValueError, OSError): those are left out and listed.
        settings: what the samples come from, kept in the manifest under "settings".
        progress: called with the number of records of each chunk as it is finished, in order.

    Raises:
        ValueError: no samples left; too many bad records, naming the first; a key twice; `out` already holds shards of
            other settings, or complete ones, or another process is writing there. What the source's `records` and the
            engine raise passes through.
    """
    source = samples if isinstance(samples, Source) else Samples(samples)
    out = Path(out)
    if samples_per_shard < 1 or workers < 1 or shard_bytes < 1:
        raise ValueError(
            "samples_per_shard, shard_bytes and workers must be 1 or more, got "
            f"{samples_per_shard}, {shard_bytes} and {workers}"
        )
    about = {
        "settings": {
            **(settings or {}),
            "samples_per_shard": samples_per_shard,
            "limit": limit,
            **described(steps, dedupe, shard_bytes),
        },
        "fingerprint": source.fingerprint(),
        **({} if features is None else {"features": features.describe()}),
    }
    folder = (out / UNFINISHED).resolve()  # the processes of another engine may start elsewhere
    with _started(out, about):
        job = Job(source, tuple(step.prepare(folder) for step in steps), folder, dedupe, shard_bytes, features)

        def tasks() -> Iterator[tuple[Job, int, int, list[Any]]]:
            records = islice(iter(source.records()), limit)
            chunks = iter(lambda: list(islice(records, samples_per_shard)), [])
            return ((job, number, number * samples_per_shard, chunk) for number, chunk in enumerate(chunks))

        if not (folder / COMPLETE).exists():
            if dedupe is not None:
                _find_duplicates(dedupe, folder, run_ordered(scan_chunk, tasks(), workers, engine))
            _write_pieces(out, run_ordered(write_chunk, tasks(), workers, engine), max_bad, progress)
        made = json.loads((folder / COMPLETE).read_bytes())
        shards = _name_shards(out, [Piece(**piece) for piece in made.pop("pieces")], samples_per_shard, shard_bytes)
        twice = repeated_key([out / shard["index"] for shard in shards])
        if twice is not None:
            raise ValueError(f"{out}: two samples have the key {twice!r}; keys must be unique")
        totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "branches", "bytes")}
        media = {kind: sum(shard["media"][kind] for shard in shards) for kind in KINDS}
        versions = {"mm": mm.__version__, "python": platform.python_version(), "numpy": np.__version__}
        whole = {**about, **totals, "media": media, **made, "versions": versions, "shards": shards}
        manifest = write_manifest(out, whole)
        shutil.rmtree(folder)
    return manifest


def described(steps: Sequence[Step], dedupe: Dedupe | None = None, shard_bytes: int = 2**30) -> dict[str, Any]:
    """What the manifest says of the settings that are not at their defaults."""
    found: dict[str, Any] = {} if shard_bytes == 2**30 else {"shard_bytes": shard_bytes}
    if steps:
        found["steps"] = [step.describe() for step in steps]
    if dedupe is not None:
        found["dedupe"] = dedupe.describe()
    return found


def remove_shards(out: Path) -> None:
    """Removes what `write_shards` writes from `out`, the manifest first, and nothing else."""
    for pattern in (MANIFEST, "shard-*.index.npy", "shard-*.tar", *REPORTS.values(), ".*.tmp"):
        for path in sorted(out.glob(pattern)):
            path.unlink()
    if (out / UNFINISHED).is_dir():
        shutil.rmtree(out / UNFINISHED)


@contextmanager
def _started(out: Path, about: dict[str, Any]) -> Iterator[None]:
    """Marks `out` as being written with these settings; raises ValueError where it already is with others."""
    if (out / MANIFEST).exists():
        raise ValueError(f"{out}: holds finished shards already; choose another folder or remove them")
    folder = out / UNFINISHED
    if not folder.is_dir() and any(out.glob("shard-*")):
        raise ValueError(f"{out}: holds shards, but neither a {MANIFEST} nor an unfinished run; remove them")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another mm shard is writing there") from None
        started = folder / STARTED
        if started.exists() and json.loads(started.read_bytes()) != json.loads(to_json(about)):
            raise ValueError(f"{out}: holds unfinished shards of other settings ({started}); remove them (--overwrite)")
        for place in (out, folder):
            for leftover in place.glob(".*.tmp"):  # of a killed run
                leftover.unlink()
        write_file(started, [to_json(about)])
        yield


def _find_duplicates(dedupe: Dedupe, folder: Path, scanned: Iterable[Path]) -> None:
    """Leaves `duplicates-NNNNNN.json` for each chunk: its records that an earlier one makes superfluous."""
    for number, found in enumerate(decide(iter(scanned), dedupe, folder)):
        write_file(folder / f"duplicates-{number:06d}.json", [json.dumps(found).encode()])


def _write_pieces(
    out: Path, receipts: Iterator[dict[str, Any]], max_bad: float, progress: Callable[[int], None]
) -> None:
    """Has all chunks written, counts what they left out, and marks the work as complete.

    Raises ValueError when too many records are bad.
    """
    done, names = Counter[str](), []
    removed = Counter[str]()
    pieces: list[dict[str, Any]] = []
    for receipt in receipts:
        pieces += receipt["pieces"]
        names.append(receipt["name"])
        removed.update(receipt["removed"])
        done.update(records=receipt["records"], quarantined=receipt["quarantined"])
        progress(receipt["records"])
        if done["quarantined"] > max_bad * max(done["records"], GRACE):
            break
    for what, name in REPORTS.items():
        _gather(out / name, [out / UNFINISHED / f"{chunk}.{name}" for chunk in names], what)
    if done["quarantined"] > max_bad * done["records"]:
        with (out / REPORTS["quarantined"]).open("rb") as file:
            first = json.loads(file.readline())
        raise ValueError(
            f"{done['quarantined']:,} of {done['records']:,} records are bad, more than --max-bad {max_bad:g} allows; "
            f"all are listed in {out / REPORTS['quarantined']}; the first: {first['cause']}"
        )
    if not pieces:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in removed.items())
        raise ValueError(f"{out}: the source gave no samples{reasons and f' that the steps keep ({reasons})'}")
    made = {"records": done["records"], "removed": dict(removed), "quarantined": done["quarantined"], "pieces": pieces}
    write_file(out / UNFINISHED / COMPLETE, [to_json(made)])


def _gather(path: Path, parts: list[Path], what: str) -> None:
    """One report from those of the chunks, some of which have none. `what` is what it lists."""
    parts = [part for part in parts if part.exists()]
    if parts:
        write_file(path, (part.read_bytes() for part in parts))
    else:
        path.unlink(missing_ok=True)


def _name_shards(out: Path, pieces: list[Piece], most: int, most_bytes: int) -> list[dict[str, Any]]:
    """Gives the pieces their final names, in order; neighbours that fit into one shard together become one.

    Descriptions of the shards for the manifest. May be interrupted and called again.
    """
    groups: list[list[Piece]] = []
    for piece in pieces:
        group = [*groups[-1], piece] if groups else []
        fits = sum(one.samples for one in group) <= most and sum(one.bytes for one in group) <= most_bytes
        if group and fits:
            groups[-1] = group
        else:
            groups.append([piece])
    shards = []
    for number, group in enumerate(groups):
        tar, index = out / f"shard-{number:06d}.tar", out / f"shard-{number:06d}.index.npy"
        whole = group[0] if len(group) == 1 else _join(out / UNFINISHED, group, tar, index)
        if len(group) == 1:
            _move(out / UNFINISHED / f"{whole.name}.tar", tar)
            _move(out / UNFINISHED / f"{whole.name}.index.npy", index)
        shards.append(whole.describe(tar, index))
    sync_folder(out)
    return shards


def _join(folder: Path, group: list[Piece], tar: Path, index: Path) -> Piece:
    """One shard of several pieces, which are removed when it is there."""
    tars = [folder / f"{piece.name}.tar" for piece in group]
    indexes = [folder / f"{piece.name}.index.npy" for piece in group]
    whole = merged(group)
    if all(path.exists() for path in (*tars, *indexes)):
        entries = [read_index(path).copy() for path in indexes]
        start = 0
        for piece, rows in zip(group, entries, strict=True):
            rows["offset"] += start
            start += piece.bytes - len(TAR_END)
        digest = write_file(tar, _bodies(tars))
        index_digest = write_file(index, [index_bytes(np.concatenate(entries))])
        for path in (*tars, *indexes):
            path.unlink()
    elif tar.is_file() and index.is_file() and tar.stat().st_size == whole.bytes:
        digest, index_digest = sha256_file(tar), sha256_file(index)
    else:
        raise ValueError(f"{tar}: its pieces are gone; start again with --overwrite")
    return replace(whole, sha256=digest, index_sha256=index_digest)


def _bodies(tars: list[Path]) -> Iterator[bytes]:
    """The members of all tars, and one end."""
    for path in tars:
        left = path.stat().st_size - len(TAR_END)
        with path.open("rb") as file:
            while left:
                block = file.read(min(left, 1 << 20))
                left -= len(block)
                yield block
    yield TAR_END


def _move(before: Path, after: Path) -> None:
    if before.exists():
        before.replace(after)
    elif not after.exists():
        raise ValueError(f"{after}: its piece {before.name} is gone; start again with --overwrite")
