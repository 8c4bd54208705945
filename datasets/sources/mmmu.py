"""MMMU: parquet files of multiple-choice and open questions with up to seven images."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mm.datasets.parquet import Row, Rows, embedded
from mm.datasets.source import Source, field, sha256_file
from mm.types import Media, Sample

IMAGES = tuple(f"image_{number}" for number in range(1, 8))
COLUMNS = ("id", "question", "options", "answer", "question_type")
MARK = re.compile(r"<image (\d)>")
CHOICE_HINT = "Answer with the option's letter from the given choices directly."
OPEN_HINT = "Answer the question using a single word or phrase."


class MMMU(Source[Row]):
    """College-level questions in the format of MMMU (Yue et al., 2024; huggingface.co/datasets/MMMU/MMMU).

    Columns: id, question, options (a Python list as text), answer, question_type, image_1 to image_7 ({"bytes",
    "path"}), and optionally explanation, img_type, topic_difficulty, subfield. "<image 1>" in a question or an option
    is the place of that image; later marks of the same image stay as text, for they refer to it. Images that nothing
    marks are left out.

    `meta` holds what the official scorer reads: question_type, answers, all_choices and index2ans; `category` is the
    subject.

    Args:
        path: a parquet file, or a folder that is searched for them.
        split: keep the files whose names begin with this ("validation-00000-of-00001.parquet"); None keeps all.
        hint: whether the user's turn ends with a line that says how to answer (LLaVA-1.5's wording).
    """

    def __init__(self, path: Path, split: str | None = None, hint: bool = True) -> None:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        files = [file for file in files if split is None or file.name.startswith(split)]
        if not files or not all(file.is_file() for file in files):
            wanted = "" if split is None else f" whose name begins with {split!r}"
            raise ValueError(f"{path}: no parquet file{wanted}")
        self.rows = Rows(files)
        self.root = path if path.is_dir() else path.parent
        self.hint = hint

    @classmethod
    def recognises(cls, path: Path) -> bool:
        files = [path] if path.suffix == ".parquet" else [*path.glob("*.parquet"), *path.glob("*/*.parquet")]
        files = [file for file in files if file.is_file()]
        return bool(files) and IMAGES[0] in Rows(files).schema(files[0]).names

    def fingerprint(self) -> dict[str, str]:
        return {str(file.relative_to(self.root)): sha256_file(file) for file in self.rows.files}

    def records(self) -> Iterable[Row]:
        for path in self.rows.files:
            missing = [name for name in (*COLUMNS, IMAGES[0]) if name not in self.rows.schema(path).names]
            if missing:
                raise ValueError(f"{path}: column {missing[0]!r} is missing")
        return self.rows

    def sample(self, record: Row) -> Sample:
        row, where = self.rows.read(record), record.where
        name = field(row, "id", str, where)
        where = f"{where} ({name})"
        choices = _choices(field(row, "options", str, where), where)
        multiple = field(row, "question_type", str, where) == "multiple-choice"
        letters = list(string.ascii_uppercase[: len(choices)])
        lines = [field(row, "question", str, where)]
        if multiple:
            lines += [f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True)]
        if self.hint:
            lines += ["", CHOICE_HINT] if multiple else [OPEN_HINT]  # blank lines as LLaVA-1.5's config has them
        content, media = interleave("\n".join(lines), row, where)
        answer = field(row, "answer", str, where)
        answers = [answer] if multiple else _answers(answer)
        meta: dict[str, Any] = {
            "id": name,
            "question": row["question"],
            "question_type": row["question_type"],
            "category": _subject(name),
            "answers": answers,
            "all_choices": letters if multiple else [],
            "index2ans": dict(zip(letters, choices, strict=True)) if multiple else {},
        }
        meta |= {key: row[key] for key in ("topic_difficulty", "subfield", "img_type") if row.get(key)}
        known = answer not in ("", "?")  # the test split hides its answers
        reply = [{"role": "assistant", "content": answers[0]}] if known else []
        key = "mmmu_" + re.sub(r"[^A-Za-z0-9_-]", "_", name)
        return Sample(key, [{"role": "user", "content": content}, *reply], media, meta=meta)


def interleave(text: str, row: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], list[Media]]:
    """Text and image parts: the first mark of an image is its place."""
    parts: list[dict[str, Any]] = []
    media: list[Media] = []
    placed: set[str] = set()
    pending = ""
    for piece in _pieces(text):
        column = f"image_{piece[7]}" if MARK.fullmatch(piece) else ""
        if not column or column in placed:
            pending += piece
            continue
        if pending:
            parts.append({"type": "text", "text": pending})
            pending = ""
        parts.append({"type": "image", "media": len(media)})
        media.append(embedded(row.get(column), "image", None, column, f"{where}: column {column!r}"))
        placed.add(column)
    return [*parts, {"type": "text", "text": pending}] if pending else parts, media


def _pieces(text: str) -> Iterator[str]:
    """The marks and what stands between them, in order."""
    end = 0
    for match in MARK.finditer(text):
        yield from (text[end : match.start()], match.group())
        end = match.end()
    yield text[end:]


def _choices(text: str, where: str) -> list[str]:
    try:
        choices = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        choices = None
    if not isinstance(choices, list):
        raise ValueError(f"{where}: column 'options': expected a list as text, got {text!r:.80}")
    return [str(choice) for choice in choices]


def _answers(text: str) -> list[str]:
    """An open question's answers: one, or a Python list of several as text."""
    if not text.startswith("["):
        return [text]
    try:
        listed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text]
    return [str(answer) for answer in listed] if isinstance(listed, list) and listed else [text]


def _subject(name: str) -> str:
    """validation_Art_Theory_12 -> Art_Theory."""
    return "_".join(name.split("_")[1:-1])
