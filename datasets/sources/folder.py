"""A folder of media with metadata.jsonl or metadata.csv: captions, questions and answers, or whole chats."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mm.datasets.source import Source, media_file, media_parts, sha256_file
from mm.types import KINDS, Media, Sample

FILES = ("metadata.jsonl", "metadata.csv")
MEDIA_COLUMNS = ("file_name", *KINDS)
TEXT_COLUMNS = ("text", "caption", "question", "answer", "messages")
META_COLUMNS = ("id", "category", "answers", "split")
ROLES = ("system", "user", "assistant")


class Row(NamedTuple):
    number: int  # 0, 1, ...
    where: str  # "FILE: line 3"
    values: dict[str, Any]


class Folder(Source[Row]):
    """Media beside a metadata file with one row a sample, in the manner of Hugging Face's imagefolder.

    Columns: `file_name` (any kind) or `image`, `audio`, `video` name media files (a list in JSONL for several); then
    either `text` or `caption` (said by the assistant), or `question` and `answer` (absent in a test set), or
    `messages`, a list of {"role", "content"} with content a string or a list of parts {"type": "text", "text": ...} and
    {"type": "image" | "audio" | "video", "media": index of the row's media}. Other known columns go to `meta`.

    Args:
        path: the folder, or its metadata file.
        split: keep the rows whose column `split` is this; None keeps all.
        keep: further columns to keep in `meta`; any other column is an error, so that no typing slip passes unseen.
    """

    def __init__(self, path: Path, split: str | None = None, keep: tuple[str, ...] = ()) -> None:
        found = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
        if len(found) != 1 or found[0].suffix not in (".jsonl", ".csv"):
            raise ValueError(f"{path}: expected a folder with one of {' and '.join(FILES)}")
        self.metadata = found[0]
        self.root = self.metadata.parent
        self.split = split
        self.keep = tuple(keep)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.name in FILES or any((path / name).is_file() for name in FILES)

    def fingerprint(self) -> dict[str, str]:
        return {self.metadata.name: sha256_file(self.metadata)}

    def records(self) -> Iterable[Row]:
        known = {*MEDIA_COLUMNS, *TEXT_COLUMNS, *META_COLUMNS, *self.keep}
        rows = _read_jsonl(self.metadata) if self.metadata.suffix == ".jsonl" else _read_csv(self.metadata)
        for number, (line, values) in enumerate(rows):
            where = f"{self.metadata}: line {line}"
            for key in values:
                if key not in known:
                    raise ValueError(f"{where}: unknown column {key!r}; to keep it in meta, set keep={key}")
            if self.split is not None and "split" not in values:
                raise ValueError(f"{where}: key 'split' is missing, and split={self.split} was asked for")
            if self.split is None or values["split"] == self.split:
                yield Row(number, where, values)

    def sample(self, record: Row) -> Sample:
        values, where = record.values, record.where
        media = list(self._media(values, where))
        meta = {key: values[key] for key in (*META_COLUMNS, *self.keep) if key in values}
        if "answer" in values and "answers" not in values:
            meta["answers"] = [values["answer"]]
        if "question" in values:
            meta["question"] = values["question"]
        key = f"{self.split or 'row'}_{record.number:08d}"
        return Sample(key, _messages(values, media, where), media, meta=meta)

    def _media(self, values: dict[str, Any], where: str) -> Iterator[Media]:
        for column in MEDIA_COLUMNS:
            names = values.get(column)
            if names is None:
                continue
            kind = None if column == "file_name" else column
            for name in names if isinstance(names, list) else [names]:
                yield media_file(self.root, name, f"{where}: key {column!r}", kind)  # type: ignore[arg-type]


def _messages(values: dict[str, Any], media: list[Media], where: str) -> list[dict[str, Any]]:
    """The chat of a row, in one of the three forms."""
    forms = [form for form in (("text",), ("caption",), ("question", "answer"), ("messages",)) if form[0] in values]
    if len(forms) != 1:
        given = "none of them" if not forms else " and ".join(form[0] for form in forms)
        raise ValueError(f"{where}: expected one of 'text', 'caption', 'question' and 'messages', found {given}")
    for key in TEXT_COLUMNS[:-1]:
        if key in values and not isinstance(values[key], str):
            raise ValueError(f"{where}: key {key!r}: expected text, got {values[key]!r:.80}")
    if "messages" in values:
        return _checked(values["messages"], len(media), f"{where}: key 'messages'")
    if "answer" in values and "question" not in values:
        raise ValueError(f"{where}: key 'answer' without 'question'")
    content = media_parts(media)
    if "question" in values:
        content.append({"type": "text", "text": values["question"]})
    answer = values.get("answer") if "question" in values else values.get("text", values.get("caption"))
    reply = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [*([{"role": "user", "content": content}] if content else []), *reply]


def _checked(messages: Any, media: int, where: str) -> list[dict[str, Any]]:
    """`messages` if they are chat messages whose parts name each of the row's `media` media once."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: expected a list of messages, got {messages!r:.80}")
    used: list[int] = []
    for index, message in enumerate(messages):
        at = f"{where}: message {index}"
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise ValueError(f"{at}: expected a role ({', '.join(ROLES)}) and a content, got {message!r:.80}")
        content = message["content"]
        if isinstance(content, str):
            continue
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
                continue
            if isinstance(part, dict) and part.get("type") in KINDS and isinstance(part.get("media"), int):
                used.append(part["media"])
                continue
            raise ValueError(f"{at}: expected text, or a list of text and media parts, got {part!r:.80}")
    if sorted(used) != list(range(media)):
        raise ValueError(f"{where}: the parts name media {used}, the row has {media}; name each once")
    return messages


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of each line that is not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except UnicodeDecodeError:
                raise ValueError(f"{path}: line {number}: not UTF-8 text") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(values, dict):
                raise ValueError(f"{path}: line {number}: expected an object, got {values!r:.80}")
            yield number, values


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of each row; an empty cell is an absent key."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise ValueError(f"{path}: line {reader.line_num}: expected {columns} cells as in the header")
                yield reader.line_num, {key: value for key, value in row.items() if value != ""}
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: not CSV ({error})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: line {reader.line_num + 1}: not UTF-8 text") from None
