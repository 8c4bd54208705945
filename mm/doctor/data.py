"""A directory of shards: are its bytes what the manifest says, can its samples be read, and what is in it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from mm.datasets.decode import decode
from mm.datasets.manifest import FORMAT, UNFINISHED, damaged_files, read_manifest, repeated_key
from mm.datasets.shard_format import read_index
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.steps import texts
from mm.doctor.findings import Finding, Histogram
from mm.types import Sample, Waveform

MOST_BAD = 0.01  # share of the sampled ones that may be unreadable: what a run tolerates by default


@dataclass
class Survey:
    """What a look at some samples of every shard has found."""

    read: int = 0
    bad: list[str] = field(default_factory=list)
    silent: int = 0  # samples that say nothing to learn
    kinds: Counter[str] = field(default_factory=Counter)  # samples by the kinds of their media
    words: list[int] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)  # longer side of images and videos, pixels
    seconds: list[float] = field(default_factory=list)  # of sounds and videos

    def add(self, sample: Sample) -> None:
        self.kinds["+".join(sorted({item.kind for item in sample.media})) or "text only"] += 1
        self.words.append(sum(len(text.split()) for text in texts(sample)))
        said = [*sample.messages, *(message for branch in sample.branches for message in branch)]
        self.silent += all(message.get("role") != "assistant" for message in said)
        for item in sample.media:
            self._measure(decode(item))

    def _measure(self, media: object) -> None:
        if isinstance(media, Tensor):
            self.sides.append(max(media.shape[1:]))
        elif isinstance(media, Waveform):
            self.seconds.append(media.samples.shape[1] / media.rate)
        else:
            with media as clip:  # type: ignore[attr-defined]
                clip.frames_at([0.0, clip.duration / 2, clip.duration])
                self.sides.append(max(clip.size))
                self.seconds.append(clip.duration)

    def histograms(self) -> list[Histogram]:
        return [
            Histogram.of("words of a sample", "words", self.words),
            Histogram.of("longer side of an image or video", "pixels", self.sides),
            Histogram.of("length of a sound or video", "seconds", self.seconds),
        ]


def check_shards(directory: Path, per_shard: int = 3, seed: int = 0) -> tuple[list[Finding], Survey]:
    """All checks of a directory; those that need a whole manifest are left out without one."""
    survey = Survey()
    name = str(directory)
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        return [Finding("manifest", "fail", str(error))], survey
    shards = manifest["shards"]
    findings = [Finding("manifest", "ok", f"{name}: {manifest['samples']:,} samples in {len(shards)} shards")]
    if manifest["format"] != FORMAT:
        old = f"{name}: of the older format {manifest['format']}, which cannot tell damage to the manifest itself"
        findings = [Finding("manifest", "warn", old)]
    damaged = damaged_files(directory, manifest)
    findings += [Finding("hashes", "fail", line) for line in damaged]
    if not damaged:
        findings.append(
            Finding("hashes", "ok", f"SHA-256 of {2 * len(shards)} files, {manifest['bytes'] / 1e6:,.1f} MB")
        )
        findings += [*_indexes(directory, shards), *_totals(name, manifest)]
    findings += _leftovers(directory)
    if all(finding.status != "fail" for finding in findings):
        findings += _look(ShardDataset(directory), survey, per_shard, seed)
    return findings, survey


def _indexes(directory: Path, shards: list[dict]) -> Iterator[Finding]:
    wrong = False
    for shard in shards:
        path = directory / shard["index"]
        try:
            entries = read_index(path)
        except ValueError as error:
            wrong = True
            yield Finding("index", "fail", str(error))
            continue
        ends = entries["offset"] + entries["length"]
        apart = len(entries) == shard["samples"] and bool((ends[:-1] <= entries["offset"][1:]).all())
        if not apart or (len(ends) and int(ends[-1]) > shard["bytes"]):
            wrong = True
            yield Finding("index", "fail", f"{path}: does not fit {shard['file']}; write the shards again")
    twice = None if wrong else repeated_key([directory / shard["index"] for shard in shards])
    if twice is not None:
        yield Finding("index", "fail", f"{directory}: two samples have the key {twice!r}")
    elif not wrong:
        yield Finding("index", "ok", "every sample has its place, and a key of its own")


def _totals(name: str, manifest: dict) -> Iterator[Finding]:
    for what in ("samples", "bytes"):
        total = sum(shard[what] for shard in manifest["shards"])
        if total != manifest[what]:
            yield Finding("manifest", "fail", f"{name}: says {manifest[what]:,} {what}, its shards sum to {total:,}")


def _leftovers(directory: Path) -> Iterator[Finding]:
    if (directory / UNFINISHED).exists():
        yield Finding("leftovers", "warn", f"{directory / UNFINISHED}: of a killed run; mm shard would remove it")
    broken = directory / "quarantine.jsonl"
    if broken.exists():
        count = broken.read_bytes().count(b"\n")
        yield Finding("quarantine", "warn", f"{broken}: {count:,} samples of the source were left out as broken")


def _look(samples: ShardDataset, survey: Survey, per_shard: int, seed: int) -> Iterator[Finding]:
    """Reads and decodes some samples of every shard."""
    draw = random.Random(seed)
    start = 0
    for end in samples.ends:
        for index in sorted(draw.sample(range(start, end), min(per_shard, end - start))):
            survey.read += 1
            try:
                survey.add(samples[index])
            except ValueError as error:
                survey.bad.append(f"{samples.locate(index)['shard']}: sample {index}: {error}")
        start = end
    if survey.bad:
        status = "fail" if len(survey.bad) > MOST_BAD * survey.read else "warn"
        more = f"; {survey.bad[0]}" + (f" (and {len(survey.bad) - 1} more)" if len(survey.bad) > 1 else "")
        yield Finding("samples", status, f"{len(survey.bad)} of {survey.read} that were decoded are broken{more}")
    else:
        yield Finding("samples", "ok", f"{survey.read} decoded, from {len(samples.ends)} shards")
    if survey.silent:
        status = "fail" if survey.silent == survey.read else "warn"
        yield Finding("answers", status, f"{survey.silent} of {survey.read} samples have no answer: nothing to learn")
    mixed = ", ".join(f"{count} {kind}" for kind, count in survey.kinds.most_common())
    if mixed:
        median = float(np.median(survey.words))
        yield Finding("modalities", "ok", f"{mixed}; {median:g} words a sample (median)")
