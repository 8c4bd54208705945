"""What `mm shard` does with each sample between its source and its shard: keep it, change it, or remove it and say why.

A step is a small object that pickles, `step(sample) -> sample`, and raises `Removed`. The steps here look at one sample
alone; what needs to know other samples is in `mm.datasets.dedupe` and `mm.datasets.decontaminate`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mm.datasets.catalog import convert
from mm.datasets.decode import probe
from mm.types import Media, Sample

T = TypeVar("T")
LANGUAGE_KEYS = ("language", "lang", "locale")


class Removed(Exception):
    """A step leaves this sample out. `reason` is counted, `detail` is for whoever reads removed.jsonl."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Step(ABC):
    """Instances pickle, and hold nothing that a sample changes: samples are worked on in any order."""

    @abstractmethod
    def __call__(self, sample: Sample, /) -> Sample:
        """The sample as it goes on. Raises Removed, and ValueError (MediaError) for a sample that is broken."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings that decide what it does, for the manifest."""

    def prepare(self, folder: Path) -> Step:
        """The step as workers are to use it; it may leave files in `folder` for them. Called once, before all work."""
        return self


@dataclass(frozen=True)
class Part(Step):
    """Keeps the samples whose id hashes into [start, stop) of [0, 1): parts that do not overlap share no id.

    The id is `meta[by]`, or the sample's key where `by` is None: splitting by `image_id` keeps all samples of an image
    on one side.
    """

    start: float
    stop: float
    by: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"--part {self.start:g}:{self.stop:g}: expected FROM:TO with 0 <= FROM < TO <= 1")

    def __call__(self, sample: Sample) -> Sample:
        name = sample.key if self.by is None else sample.meta.get(self.by)
        if name is None:
            raise ValueError(f"sample {sample.key}: --part-by {self.by}: its meta has no such key")
        share = int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:8], "big") / 2**64
        if self.start <= share < self.stop:
            return sample
        raise Removed("other part", f"id {name} is at {share:.6f}")

    def describe(self) -> dict[str, Any]:
        return {"part": [self.start, self.stop], **({} if self.by is None else {"part_by": self.by})}


@dataclass(frozen=True)
class Filter(Step):
    """Limits that a sample must keep; None sets none.

    min_side, max_side        pixels of the shorter and the longer side, of every image and video
    max_aspect                longer side over shorter
    min_seconds, max_seconds  of every sound and video
    min_words, max_words      of all of the sample's text
    max_bytes                 of all of its media
    language                  codes, one of which meta's language, lang or locale is ("en" takes "en-GB" too)
    """

    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    min_words: int | None = None
    max_words: int | None = None
    max_bytes: int | None = None
    language: tuple[str, ...] = ()

    def __call__(self, sample: Sample) -> Sample:
        self._check_language(sample)
        if self.min_words is not None or self.max_words is not None:
            count = sum(len(text.split()) for text in texts(sample))
            _check("words", count, self.min_words, self.max_words)
        if self.max_bytes is not None:
            _check("bytes", sum(map(_bytes, sample.media)), None, self.max_bytes)
        sides = (self.min_side, self.max_side, self.max_aspect)
        lengths = (self.min_seconds, self.max_seconds)
        for item in sample.media:
            seen = item.kind != "audio" and sides != (None, None, None)
            heard = item.kind != "image" and lengths != (None, None)
            if seen or heard:
                self._check_medium(item, seen, heard)
        return sample

    def _check_medium(self, item: Media, seen: bool, heard: bool) -> None:
        found = probe(item)
        if seen:
            short, long = sorted((found.width, found.height))
            _check("shorter side", short, self.min_side, None)
            _check("longer side", long, None, self.max_side)
            _check("aspect", long / max(1, short), None, self.max_aspect)
        if heard:
            _check("seconds", found.seconds, self.min_seconds, self.max_seconds)

    def _check_language(self, sample: Sample) -> None:
        if self.language:
            codes = [str(sample.meta[key]).lower().replace("_", "-") for key in LANGUAGE_KEYS if sample.meta.get(key)]
            wanted = [code.lower() for code in self.language]
            if not any(code == one or code.startswith(f"{one}-") for code in codes for one in wanted):
                raise Removed("language", codes[0] if codes else "unknown")

    def describe(self) -> dict[str, Any]:
        return {"filter": given(self)}


def texts(sample: Sample) -> Iterator[str]:
    """Everything that is said in a sample: the text of every message and branch."""
    for message in [*sample.messages, *(message for branch in sample.branches for message in branch)]:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (part["text"] for part in content if isinstance(part, dict) and part.get("type") == "text")


def from_options(cls: type[T], options: Sequence[str], flag: str) -> T | None:
    """`cls` with the fields that KEY=VALUE texts give, None without any.

    Raises ValueError, naming the flag, for what is no KEY=VALUE, an unknown key and a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{flag} {text!r}: write KEY=VALUE")
        if key not in known:
            raise ValueError(f"{flag} {text!r}: no key {key!r}; there are: {', '.join(known)}")
        values[key] = convert(value, hints[key], f"{flag} {key}")
    return cls(**values) if values else None


def given(step: Any) -> dict[str, Any]:
    """The fields that are not at their default."""
    return {
        field.name: list(value) if isinstance(value := getattr(step, field.name), tuple) else value
        for field in dataclasses.fields(step)
        if getattr(step, field.name) != field.default
    }


def _check(what: str, value: float, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise Removed(what, f"{value:g} is less than {low:g}")
    if high is not None and value > high:
        raise Removed(what, f"{value:g} is more than {high:g}")


def _bytes(item: Media) -> int:
    return len(item.data) if isinstance(item.data, bytes) else item.data.stat().st_size
