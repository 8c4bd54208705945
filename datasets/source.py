"""What every source of samples is made of: cheap `records`, turned into a `Sample` one at a time.

    records() -> record, record, ...       cheap and in a fixed order: a line of a file, an index, a row
    sample(record) -> Sample               the work: reading, rendering, encoding; may run in another process

Splitting the two lets `mm.datasets.shards` hand slices of records to worker processes and still write the same bytes
whatever their number.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mm.types import Kind, Media, Sample

Record = TypeVar("Record")

SMALL = 256 * 2**20  # bytes of a file that may be read whole, or hashed whole
MAX_LINE = 256 * 2**20  # bytes of one line of a JSONL file
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), "audio"),
    **dict.fromkeys((".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov"), "video"),
}


class Source(ABC, Generic[Record]):
    """An ordered, repeatable collection of samples. Instances can be pickled; iterating twice gives the same samples.

    A file `mm/datasets/sources/NAME.py` holds one subclass, which `mm shard NAME` builds by its typed constructor. The
    first line of the file's docstring is the help text. A source that reads a path takes it as the argument `path`.
    """

    @abstractmethod
    def records(self) -> Iterable[Record]:
        """The records in their fixed order. Raises ValueError naming file, line and key of what cannot be read."""

    @abstractmethod
    def sample(self, record: Record) -> Sample:
        """The sample of one record. Raises ValueError as `records` does."""

    def __iter__(self) -> Iterator[Sample]:
        return map(self.sample, self.records())

    def fingerprint(self) -> dict[str, str]:
        """What else the samples depend on (SHA-256 of annotation files, versions): kept in the manifest of shards."""
        return {}

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a bare path is in this source's format, so that `mm shard PATH` needs no name."""
        return False


class Samples(Source[Sample]):
    """Samples that already exist, as a source."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.items = samples

    def __getstate__(self) -> dict[str, Any]:
        return {"items": ()}  # worker processes are sent the records; they need no copy of all of them

    def records(self) -> Iterable[Sample]:
        return self.items

    def sample(self, record: Sample) -> Sample:
        return record


@dataclass(frozen=True)
class Question:
    """A question about media with its reference answer; `meta` holds what scorers need (`answers`, `category`, ...)."""

    text: str
    answer: str | None
    meta: dict[str, Any]


def branched(key: str, media: list[Media], questions: Iterable[Question], meta: dict[str, Any]) -> Sample:
    """One sample for all questions about the same media: the media once, a branch a question.

    `meta` of the questions is collected in lists, in the order of the branches. Questions need answers.
    """
    questions = list(questions)
    gathered: dict[str, list[Any]] = {}
    for question in questions:
        for name, value in question.meta.items():
            gathered.setdefault(name, []).append(value)
    return Sample(
        key=key,
        messages=[{"role": "user", "content": media_parts(media)}],
        media=media,
        branches=[[{"role": "user", "content": q.text}, *_answer(q)] for q in questions],
        meta={**meta, **gathered},
    )


def single(key: str, media: list[Media], question: Question, meta: dict[str, Any]) -> Sample:
    """A plain chat with one question: media, question, answer (left out where there is none, as in test sets)."""
    content = [*media_parts(media), {"type": "text", "text": question.text}]
    return Sample(
        key=key,
        messages=[{"role": "user", "content": content}, *_answer(question)],
        media=media,
        meta={**meta, "question": question.text, **question.meta},
    )


def media_parts(media: list[Media]) -> list[dict[str, Any]]:
    return [{"type": item.kind, "media": index} for index, item in enumerate(media)]


def _answer(question: Question) -> list[dict[str, Any]]:
    return [] if question.answer is None else [{"role": "assistant", "content": question.answer}]


def media_file(root: Path, name: Any, where: str, kind: Kind | None = None) -> Media:
    """The media file `name` under `root`, checked to be there and to be of a known kind; its bytes are not read.

    Raises ValueError, beginning with `where` (file, line, key), for a name that is no string, leaves `root` (also
    through a link), does not exist, or has a suffix of no kind or of another kind than `kind`.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: expected a file name, got {name!r}")
    path = root / name
    # An annotation file from elsewhere must not be able to pull /etc/passwd into a data set.
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{where}: {name!r} lies outside {root}; put the file under that folder")
    if not path.is_file():
        raise ValueError(f"{where}: no file {path}")
    found = SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise ValueError(f"{where}: {name!r} ends in no known image, audio or video suffix")
    if kind is not None and found != kind:
        raise ValueError(f"{where}: {name!r} is {found}, expected {kind}")
    return Media(found, path, name)


def field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, checked to be there and of type `kind`. Raises ValueError naming `where` and the key."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {name!r}, got {type(record).__name__}")
    if name not in record:
        raise ValueError(f"{where}: key {name!r} is missing (there are: {', '.join(map(str, record)) or 'none'})")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: key {name!r}: expected {expected}, got {value!r:.80}")
    return value


def read_items(path: Path, key: str | None = None) -> Iterator[Any]:
    """The items of the list that a JSON file is, or has under `key`, one at a time: files may be larger than memory.

    Raises ValueError naming the file, and the line of a syntax error where the file is small enough to be read again.
    """
    import ijson

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        try:
            empty = True
            for item in ijson.items(file, "item" if key is None else f"{key}.item", use_float=True):
                empty = False
                yield item
            if empty and key is not None:
                file.seek(0)
                if not any(event == ("", "map_key", key) for event in ijson.parse(file)):
                    raise ValueError(f"{path}: key {key!r} is missing")
        except (ijson.JSONError, UnicodeDecodeError) as error:
            if path.stat().st_size < SMALL:
                read_json(path)
            raise ValueError(f"{path}: not JSON ({str(error).splitlines()[0]})") from None


def read_value(path: Path, key: str, default: Any) -> Any:
    """`key` of the object that a JSON file is, without reading on behind it. Raises ValueError as `read_items`."""
    import ijson

    with path.open("rb") as file:
        try:
            return next(iter(ijson.items(file, key, use_float=True)), default)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON ({str(error).splitlines()[0]})") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError naming the file, and the line of a syntax error."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


class Line(NamedTuple):
    """A line of a text file by its place, so that records stay small however long lines are."""

    path: Path
    number: int  # from 1
    offset: int
    length: int

    @property
    def where(self) -> str:
        return f"{self.path}: line {self.number}"

    def read(self) -> bytes:
        if self.length > MAX_LINE:
            raise ValueError(f"{self.where}: {self.length:,} bytes, more than {MAX_LINE:,}")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def json(self) -> dict[str, Any]:
        """The JSON object in the line. Raises ValueError naming file and line."""
        try:
            value = json.loads(self.read())
        except UnicodeDecodeError:
            raise ValueError(f"{self.where}: not UTF-8 text") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{self.where}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}: expected an object, got {value!r:.80}")
        return value


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank. Raises ValueError if there is no such file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    offset = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield Line(path, number, offset, len(text))
            offset += len(text)


def marked_parts(text: str, marks: Mapping[str, Kind], taken: dict[str, int], media: Sequence[Media]) -> Any:
    """A turn's text with marks such as "<image>" as a list of parts: each mark is the next medium of its kind.

    `taken` counts, for each kind, those that earlier turns have used. Marks of kinds that the sample has none of are
    ordinary text. The line break that sets a mark off goes with it. Text without marks comes back as it is.
    """
    places = {kind: [i for i, item in enumerate(media) if item.kind == kind] for kind in set(marks.values())}
    wanted = [mark for mark, kind in marks.items() if places[kind]]
    pattern = "|".join(map(re.escape, wanted))
    if not wanted or not re.search(pattern, text):
        return text
    parts: list[dict[str, Any]] = []
    pieces = re.split(f"({pattern})", text)
    for index, piece in enumerate(pieces):
        if index % 2:
            kind = marks[piece]
            number = taken[kind] = taken.get(kind, 0) + 1
            parts.append({"type": kind, "media": places[kind][number - 1] if number <= len(places[kind]) else -1})
            continue
        piece = piece.removeprefix("\n") if index else piece
        piece = piece.removesuffix("\n") if index < len(pieces) - 1 else piece
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def fingerprint_file(path: Path) -> str:
    """Tells a file from a changed one: its SHA-256, or for a large one that of its size and of 64 places in it."""
    size = path.stat().st_size
    if size <= SMALL:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in range(64):
            file.seek(min(size - (1 << 16), place * (size // 63)))
            digest.update(file.read(1 << 16))
    return f"sampled:{digest.hexdigest()}"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
