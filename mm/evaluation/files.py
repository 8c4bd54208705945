"""Reading the files in which benchmarks are published: parquet, JSON lines, CSV and TSV, images inside of them.

Everything wrong with a file is a ValueError of one line that names the file, the line or row, and the key.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm.datasets.source import field
from mm.types import Media

SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def parquet_rows(path: Path, pattern: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE: row N", row) of a parquet file, or of those below a folder that fit the glob `pattern`, by name."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path}: no parquet file {pattern}")
    for name in files:
        try:
            file = ParquetFile(name)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{name}: not a parquet file ({error})") from None
        with file:
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                there = ", ".join(file.schema_arrow.names)
                raise ValueError(
                    f"{name}: column {missing[0]!r} is missing: another version of the file? (it has {there})"
                )
            number = 0
            for batch in file.iter_batches(batch_size=64):  # images are large: only a few rows at a time
                for row in batch.to_pylist():
                    yield f"{name}: row {number}", row
                    number += 1


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE: line N", object) of a JSON-lines file, gzipped or not."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not a gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number}: not JSON ({error.msg})") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path}: line {number}: expected an object, got {type(value).__name__}")
            yield f"{path}: line {number}", value


def table(
    path: Path, columns: Sequence[str], delimiter: str = ",", header: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """("FILE: line N", {column: text}) of a CSV or TSV file. Without a `header`, `columns` are what each line holds."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        # In a TSV a quotation mark is a character like any other.
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
        names = next(reader, []) if header else list(columns)
        missing = [column for column in columns if column not in names]
        if missing:
            raise ValueError(f"{path}: column {missing[0]!r} is missing: another version of the file? (it has {names})")
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(f"{path}: line {reader.line_num}: {len(row)} fields, expected {len(names)}")
            yield f"{path}: line {reader.line_num}", dict(zip(names, row, strict=True))


def embedded_image(value: Any, name: str, where: str) -> Media:
    """An image as Hugging Face's parquet files hold it, {"bytes", "path"}, or its bytes alone."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"{where}: column {name!r}: there is no image")
    suffix = next((suffix for start, suffix in SIGNATURES.items() if data.startswith(start)), None)
    if suffix is None:
        raise ValueError(f"{where}: column {name!r}: not a PNG, JPEG, GIF, WebP or BMP image")
    return Media("image", data, f"{name}{suffix}")


def check_version(data: Any, key: str, expected: str, where: Path) -> None:
    """Raises ValueError if the file says that it is another version; one that says nothing passes."""
    found = data.get(key) if isinstance(data, dict) else None
    if found is not None and str(found) != expected:
        raise ValueError(f"{where}: {key} is {found!r}; this benchmark reads version {expected}")


def lettered(options: Sequence[str], form: str = "{letter}. {option}") -> tuple[list[str], str]:
    """Letters from A on, and the options, a line each."""
    letters = [chr(ord("A") + index) for index in range(len(options))]
    lines = [form.format(letter=letter, option=text) for letter, text in zip(letters, options, strict=True)]
    return letters, "\n".join(lines)


def letter_answer(row: dict[str, Any], key: str, letters: Sequence[str], where: str) -> str:
    """A correct option's letter, checked to be one."""
    answer = field(row, key, str, where).strip()
    if answer not in letters:
        raise ValueError(f"{where}: key {key!r}: expected one of {', '.join(letters)}, got {answer!r}")
    return answer
