"""Common Voice folders: read speech in many languages (SPLIT.tsv and clips/)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm.datasets.source import Source, media_file, media_parts, sha256_file
from mm.types import Sample

KEPT = ("client_id", "age", "gender", "accents", "variant", "locale", "up_votes", "down_votes")


class CommonVoice(Source[tuple[int, dict[str, str]]]):
    """Recordings in the layout of Common Voice (Ardila et al., 2020): a TSV a split with the columns `path` and
    `sentence`, and the clips in a folder beside it. client_id, age, gender, accents, variant, locale and the votes go
    to meta, the locale as `language` too.

    Args:
        path: the folder of one language, or a TSV file.
        split: the TSV: train, dev, test, validated, ...
        prompt: what the user says after the sound; "" says nothing.
    """

    def __init__(self, path: Path, split: str = "train", prompt: str = "") -> None:
        self.file = path / f"{split}.tsv" if path.is_dir() else path
        if not self.file.is_file():
            raise ValueError(f"{self.file}: no such file")
        self.split, self.prompt = self.file.stem, prompt
        self.clips = self.file.parent / "clips"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        folder = path if path.is_dir() else path.parent
        return (folder / "clips").is_dir() and (path.suffix == ".tsv" or any(folder.glob("*.tsv")))

    def fingerprint(self) -> dict[str, str]:
        return {self.file.name: sha256_file(self.file)}

    def records(self) -> Iterable[tuple[int, dict[str, str]]]:
        with self.file.open(encoding="utf-8", newline="") as file:
            # Sentences hold quotation marks that quote nothing.
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            try:
                for name in ("path", "sentence"):
                    if name not in (reader.fieldnames or ()):
                        raise ValueError(f"{self.file}: line 1: column {name!r} is missing")
                for row in reader:
                    yield reader.line_num, row
            except UnicodeDecodeError:
                raise ValueError(f"{self.file}: line {reader.line_num + 1}: not UTF-8 text") from None

    def sample(self, record: tuple[int, dict[str, str]]) -> Sample:
        line, row = record
        where = f"{self.file}: line {line}"
        if None in row or None in row.values():
            raise ValueError(f"{where}: expected as many cells as the header has")
        name, text = row["path"], row["sentence"].strip()
        if not text:
            raise ValueError(f"{where}: column 'sentence' is empty")
        media = [media_file(self.clips, name if "." in name else f"{name}.mp3", f"{where}: column 'path'", "audio")]
        content: list[dict[str, Any]] = media_parts(media)
        if self.prompt:
            content.append({"type": "text", "text": self.prompt})
        meta: dict[str, Any] = {"id": Path(name).stem, "answers": [text]}
        meta |= {key: row[key] for key in KEPT if row.get(key)}
        if row.get("locale"):
            meta["language"] = row["locale"]
        key = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[-40:]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        return Sample(f"cv_{line:08d}_{key}", messages, media, meta=meta)
