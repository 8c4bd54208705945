"""Hugging Face parquet files with embedded images and sounds, as the `datasets` library writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mm.datasets.parquet import Row, Rows, embedded
from mm.datasets.source import Source, fingerprint_file, marked_parts, media_parts
from mm.types import KINDS, Kind, Media, Sample

NAMES: dict[str, tuple[str, ...]] = {  # what a column is taken for where no option says
    "image": ("image", "images"),
    "audio": ("audio",),
    "video": ("video",),
    "text": ("text", "caption", "sentence", "transcription"),
    "question": ("question", "query"),
    "answer": ("answer", "label"),
    "messages": ("messages", "conversations", "texts"),
}
MARKS: dict[str, Kind] = {"<image>": "image", "<video>": "video", "<audio>": "audio"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
META = ("id", "category", "language", "locale", "split", "answers")


class Parquet(Source[tuple[int, Row]]):
    """One sample a row: media embedded as {"bytes", "path"} (or lists of them, or plain bytes), and what is said.

    Said is one of: a text, by the assistant; a question with its answer (a class label is written as its name); a chat:
    a list of {"role", "content"} or {"from", "value"}, or of {"user", "assistant"} pairs. Marks such as "<image>" in
    what the user says are the media's places; without any, media come first.

    Columns are found by name (image, images; audio; video; text, caption, sentence, transcription; question, query;
    answer, label; messages, conversations, texts), unless an option names one. id, category, language, locale, split,
    answers and the columns in `keep` go to meta; others are left out.

    Args:
        path: a file, or a folder that is searched for them.
        split: the files whose names begin with this ("train-00000-of-00008.parquet"); None keeps all.
        image, audio, video, text, question, answer, messages: the column; "" for none.
        keep: further columns for meta.
    """

    def __init__(
        self,
        path: Path,
        split: str | None = None,
        image: str | None = None,
        audio: str | None = None,
        video: str | None = None,
        text: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        messages: str | None = None,
        keep: tuple[str, ...] = (),
    ) -> None:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        files = [file for file in files if split is None or file.name.startswith(split)]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"{path}: no parquet file{'' if split is None else f' whose name begins with {split!r}'}")
        self.root = path if path.is_dir() else path.parent
        self.rows = Rows(files)
        self.keep = tuple(keep)
        schema = self.rows.schema(files[0])
        given = {"image": image, "audio": audio, "video": video, "text": text}
        given |= {"question": question, "answer": answer, "messages": messages}
        self.columns = {what: _column(what, name, schema.names, path) for what, name in given.items()}
        if all(self.columns[what] is None for what in ("text", "question", "messages", "answer")):
            raise ValueError(
                f"{path}: nothing is said: no column of {', '.join(schema.names)} holds text; set text=NAME"
            )
        self.labels = _labels(schema, self.columns["answer"])

    @classmethod
    def recognises(cls, path: Path) -> bool:
        files = [path] if path.suffix == ".parquet" else [*path.glob("*.parquet"), *path.glob("*/*.parquet")]
        files = [file for file in files if file.is_file()]
        return bool(files) and "image_1" not in Rows(files).schema(files[0]).names  # those are MMMU's

    def fingerprint(self) -> dict[str, str]:
        return {str(file.relative_to(self.root)): fingerprint_file(file) for file in self.rows.files}

    def records(self) -> Iterable[tuple[int, Row]]:
        return enumerate(self.rows)

    def sample(self, record: tuple[int, Row]) -> Sample:
        number, row = record
        values, where = self.rows.read(row), row.where
        media = list(self._media(values, where))
        messages = self._messages(values, media, where)
        meta = {name: values[name] for name in (*META, *self.keep) if values.get(name) is not None}
        if self._said(values, "question", where) is not None:
            meta["question"] = self._said(values, "question", where)
            meta.setdefault("answers", [message["content"] for message in messages[1:]])
        return Sample(f"row_{number:010d}", messages, media, meta=_plain(meta, where))

    def _media(self, values: dict[str, Any], where: str) -> Iterator[Media]:
        count = 0
        for kind in KINDS:
            column = self.columns[kind]
            value = None if column is None else values.get(column)
            for item in value if isinstance(value, list) else [value]:
                if item is not None:
                    yield embedded(item, kind, self.root, f"{kind}_{count}", f"{where}: column {column!r}")
                    count += 1

    def _messages(self, values: dict[str, Any], media: list[Media], where: str) -> list[dict[str, Any]]:
        column = self.columns["messages"]
        if column is not None and values.get(column):
            return _chat(values[column], media, f"{where}: column {column!r}")
        question, answer = self._said(values, "question", where), self._said(values, "answer", where)
        text = self._said(values, "text", where)
        if question is None:
            answer = text if answer is None else answer
        content = media_parts(media) if question is None else _placed(question, media, {})
        if answer is None and question is None:
            raise ValueError(f"{where}: nothing is said in it")
        user = [{"role": "user", "content": content}] if content else []
        return [*user, *([] if answer is None else [{"role": "assistant", "content": answer}])]

    def _said(self, values: dict[str, Any], what: str, where: str) -> str | None:
        column = self.columns[what]
        value = None if column is None else values.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(self.labels):
                raise ValueError(f"{where}: column {column!r}: {value} is not the number of a class with a name")
            return self.labels[value]
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: column {column!r}: expected text, got {value!r:.80}")
        return value


def _column(what: str, name: str | None, there: list[str], path: Path) -> str | None:
    """The column for a purpose: the one named, or the first there is of NAMES."""
    if name == "":
        return None
    if name is not None and name not in there:
        raise ValueError(f"{path}: {what}={name}: no such column; there are: {', '.join(there)}")
    return name or next((one for one in NAMES[what] if one in there), None)


def _labels(schema: Any, column: str | None) -> list[str]:
    """The names of a column's classes, as `datasets` keeps them in the schema."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = stored.get("info", {}).get("features", {}).get(column, {})
    return list(feature.get("names", [])) if isinstance(feature, dict) else []


def _chat(turns: Any, media: list[Media], where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise ValueError(f"{where}: expected a list of messages, got {turns!r:.80}")
    said: list[tuple[Any, Any]] = []
    for turn in turns:
        if isinstance(turn, dict) and {"user", "assistant"} <= turn.keys():
            said += [("user", turn["user"]), ("assistant", turn["assistant"])]
        elif isinstance(turn, dict):
            said.append((turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))))
        else:
            said.append((None, turn))
    taken: dict[str, int] = {}
    messages: list[dict[str, Any]] = []
    for number, (speaker, text) in enumerate(said):
        if speaker not in ROLES or not isinstance(text, str):
            raise ValueError(f"{where}: message {number}: expected a speaker and a text, got {speaker!r}: {text!r:.60}")
        role, content = ROLES[speaker], text
        if role == "user":
            first = not any(message["role"] == "user" for message in messages)
            marked = any(mark in str(other) for mark in MARKS for _, other in said)
            content = _placed(text, media if marked or first else [], taken)
        messages.append({"role": role, "content": content})
    if sum(taken.values()) not in (0, len(media)):
        raise ValueError(f"{where}: {len(media)} media but {sum(taken.values())} marks; there must be as many")
    return messages


def _placed(text: str, media: list[Media], taken: dict[str, int]) -> Any:
    """What the user says, with the media at their marks, or before it where no mark is in it."""
    content = marked_parts(text, MARKS, taken, media)
    if not isinstance(content, str) or sum(taken.values()) or not media:
        return content
    return [*media_parts(media), {"type": "text", "text": content}]


def _plain(meta: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        json.dumps(meta)
    except TypeError as error:
        raise ValueError(f"{where}: a column kept in meta is not plain data ({error})") from None
    return meta
