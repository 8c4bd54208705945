"""Plain text and JSONL corpora: documents to learn a language from, without questions."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mm.datasets.source import Line, Source, fingerprint_file, lines
from mm.types import Sample

SUFFIXES = (".txt", ".md", ".jsonl", ".txt.gz", ".jsonl.gz")
MAX_BYTES = 64 * 2**20  # of one document
META = ("id", "language", "lang", "url", "source", "title")


class Record(NamedTuple):
    number: int
    where: str
    content: Path | Line | bytes  # a whole file, a line of one, or what was read from a compressed one


class Text(Source[Record]):
    """Documents, each said by the assistant, so that all of its text is learned.

    `.txt` and `.md` files hold one document, or one a line; `.jsonl` files one object a line, whose text is under a
    key. Either may be compressed (`.gz`). Keys of JSON that are known (id, language, lang, url, source, title) or named
    in `keep` go to meta; the others are left out.

    Args:
        path: a file, or a folder that is searched for them.
        by: "file" or "line": what a document of plain text is.
        key: of the text in JSONL.
        keep: further keys of JSONL for meta.
    """

    def __init__(
        self, path: Path, by: Literal["file", "line"] = "file", key: str = "text", keep: tuple[str, ...] = ()
    ) -> None:
        if by not in ("file", "line"):
            raise ValueError(f"text: by must be file or line, got {by!r}")
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES)) if path.is_dir() else [path]
        self.files = [file for file in found if file.is_file()]
        if not self.files:
            raise ValueError(f"{path}: no text file ({', '.join(SUFFIXES)})")
        if not self.files[0].name.endswith(SUFFIXES):
            raise ValueError(f"{path}: not a text file ({', '.join(SUFFIXES)})")
        self.root = path if path.is_dir() else path.parent
        self.by, self.key, self.keep = by, key, tuple(keep)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.is_dir():
            # Those of LibriSpeech hold transcripts of what lies beside them.
            plain = [file for file in path.glob("*.txt") if not file.name.endswith(".trans.txt")]
            return bool(plain) or any(path.glob("*.jsonl.gz"))
        if path.name in ("metadata.jsonl", "metadata.csv") or not path.name.endswith(SUFFIXES):
            return False
        if ".jsonl" not in path.name:
            return True
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.readline(1 << 16)
        return b'"text"' in head and b'"text_list"' not in head and b'"conversations"' not in head

    def fingerprint(self) -> dict[str, str]:
        return {str(file.relative_to(self.root)): fingerprint_file(file) for file in self.files}

    def records(self) -> Iterable[Record]:
        return (Record(number, where, content) for number, (where, content) in enumerate(self._documents()))

    def sample(self, record: Record) -> Sample:
        content, meta = record.content, dict[str, Any]()
        if isinstance(content, Path):
            data = _whole(content)
        else:
            data = content.read() if isinstance(content, Line) else content
        if ".jsonl" in record.where.partition(": line ")[0][-9:]:
            values = content.json() if isinstance(content, Line) else _object(data, record.where)
            text = values.get(self.key)
            if not isinstance(text, str):
                raise ValueError(f"{record.where}: key {self.key!r}: expected text, got {text!r:.80}")
            meta = {name: values[name] for name in (*META, *self.keep) if name in values and name != self.key}
        else:
            try:
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{record.where}: not UTF-8 text (byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"{record.where}: no text")
        return Sample(f"text_{record.number:010d}", [{"role": "assistant", "content": text.strip("\n")}], meta=meta)

    def _documents(self) -> Iterator[tuple[str, Path | Line | bytes]]:
        for file in self.files:
            whole = self.by == "file" and ".jsonl" not in file.name
            if whole:
                yield str(file), file
            elif file.suffix == ".gz":
                with gzip.open(file) as stream:
                    for number, line in enumerate(stream, start=1):
                        if line.strip():
                            yield f"{file}: line {number}", line
            else:
                yield from ((line.where, line) for line in lines(file))


def _whole(path: Path) -> bytes:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: a document of more than {MAX_BYTES:,} bytes; set by=line, or cut it into files")
    return data


def _object(data: bytes, where: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {value!r:.80}")
    return value
