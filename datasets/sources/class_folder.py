"""Folders named after classes, with images, sounds or videos in them (imagefolder and audiofolder layouts)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm.datasets.source import SUFFIXES, Source, media_file, media_parts
from mm.types import Sample


class ClassFolder(Source[tuple[int, str, str]]):
    """Media in one folder a class, whose name is the answer: ROOT/LABEL/FILE or, with a split, ROOT/SPLIT/LABEL/FILE.

    Args:
        path: the folder.
        split: the folder of a split below it.
        prompt: what the user says after the medium; "" says nothing.
        spaces: whether "_" in a folder's name stands for a space.
    """

    def __init__(self, path: Path, split: str | None = None, prompt: str = "", spaces: bool = True) -> None:
        self.root = path if split is None else path / split
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder")
        self.split, self.prompt, self.spaces = split, prompt, spaces

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if not path.is_dir() or any(path.glob("metadata.*")) or any(path.glob("*.tsv")) or any(path.glob("*.parquet")):
            return False
        folders = [folder for folder in path.iterdir() if folder.is_dir()]
        return len(folders) > 1 and all(
            any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()) for folder in folders
        )

    def records(self) -> Iterable[tuple[int, str, str]]:
        number = 0
        for folder in sorted(entry for entry in self.root.iterdir() if entry.is_dir()):
            for file in sorted(folder.rglob("*")):
                if file.suffix.lower() in SUFFIXES:
                    yield number, folder.name, str(file.relative_to(self.root))
                    number += 1
        if not number:
            raise ValueError(f"{self.root}: no media in folders named after classes")

    def sample(self, record: tuple[int, str, str]) -> Sample:
        number, label, name = record
        media = [media_file(self.root, name, f"{self.root / name}")]
        content: list[dict[str, Any]] = media_parts(media)
        if self.prompt:
            content.append({"type": "text", "text": self.prompt})
        answer = label.replace("_", " ") if self.spaces else label
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        key = f"class_{number:08d}_{re.sub(r'[^A-Za-z0-9_-]', '_', label)[:40]}"
        return Sample(key, messages, media, meta={"id": name, "category": answer, "answers": [answer]})
