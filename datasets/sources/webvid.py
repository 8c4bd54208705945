"""WebVid-style CSV: videos with captions (columns videoid, name, page_dir) and a folder of files."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm.datasets.source import Source, fingerprint_file, media_file, media_parts
from mm.types import Sample

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")


class WebVid(Source[tuple[int, dict[str, str]]]):
    """Captioned videos in the format of WebVid (Bain et al., 2021): a CSV with `videoid` and `name` (the caption), and
    files `PAGE_DIR/VIDEOID.mp4` (or .webm, .mkv, .mov; without the column page_dir, just VIDEOID.mp4).

    Args:
        path: the CSV file.
        videos: the folder of videos; by default `videos` beside the file.
        prompt: what the user says after the video; "" says nothing.
        missing: "error", or "skip" to leave out rows whose file is not there (links die).
    """

    def __init__(self, path: Path, videos: Path | None = None, prompt: str = "", missing: str = "error") -> None:
        if missing not in ("error", "skip"):
            raise ValueError(f"webvid: missing must be error or skip, got {missing!r}")
        self.path, self.prompt, self.missing = path, prompt, missing
        self.videos = videos or path.parent / "videos"
        if not self.videos.is_dir():
            raise ValueError(f"{self.videos}: no such folder; set videos=DIR")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.suffix != ".csv" or not path.is_file():
            return False
        with path.open("rb") as file:
            return b"videoid" in file.readline(1 << 12)

    def fingerprint(self) -> dict[str, str]:
        return {self.path.name: fingerprint_file(self.path)}

    def records(self) -> Iterable[tuple[int, dict[str, str]]]:
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            try:
                for name in ("videoid", "name"):
                    if name not in (reader.fieldnames or ()):
                        raise ValueError(f"{self.path}: line 1: column {name!r} is missing")
                for row in reader:
                    if self.missing == "error" or (self.videos / self._file(row)).is_file():
                        yield reader.line_num, row
            except csv.Error as error:
                raise ValueError(f"{self.path}: line {reader.line_num}: not CSV ({error})") from None
            except UnicodeDecodeError:
                raise ValueError(f"{self.path}: line {reader.line_num + 1}: not UTF-8 text") from None

    def sample(self, record: tuple[int, dict[str, str]]) -> Sample:
        line, row = record
        where = f"{self.path}: line {line}"
        text = (row["name"] or "").strip()
        if not text:
            raise ValueError(f"{where}: column 'name' is empty")
        media = [media_file(self.videos, self._file(row), f"{where}: column 'videoid'", "video")]
        content: list[dict[str, Any]] = media_parts(media)
        if self.prompt:
            content.append({"type": "text", "text": self.prompt})
        meta = {"id": row["videoid"], "captions": [text]}
        meta |= {key: row[key] for key in ("contentUrl", "duration") if row.get(key)}
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        return Sample(f"webvid_{line:010d}", messages, media, meta=meta)

    def _file(self, row: dict[str, str]) -> str:
        base = "/".join(part for part in (row.get("page_dir") or "", row["videoid"] or "") if part)
        return next((base + end for end in SUFFIXES if (self.videos / (base + end)).is_file()), base + SUFFIXES[0])
