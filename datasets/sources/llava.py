"""LLaVA JSON: a list of conversations with "<image>" where an image stands, and a folder of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm.datasets.source import Source, field, media_file, read_json, sha256_file
from mm.types import Media, Sample

MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LLaVA(Source[tuple[int, dict[str, Any]]]):
    """Instruction data in the format of LLaVA-1.5 (Liu et al., 2023).

    [{"id", "image", "conversations": [{"from": "human" | "gpt" | "system", "value"}]}]

    `image` is a file name, a list of them, or absent. Only here, where the format says so, does text hold a mark: each
    "<image>" in a record's human turns becomes the next of its images, in place. In a record without images, and in
    what the assistant says, it is ordinary text.

    Args:
        path: the JSON file.
        images: the folder of the images; by default the file's own.
    """

    def __init__(self, path: Path, images: Path | None = None) -> None:
        self.path = path
        self.images = images or path.parent
        if not self.images.is_dir():
            raise ValueError(f"llava: no folder of images {self.images}")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.suffix != ".json" or not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(1 << 16)
        return head.lstrip()[:1] == b"[" and b'"conversations"' in head

    def fingerprint(self) -> dict[str, str]:
        return {self.path.name: sha256_file(self.path)}

    def records(self) -> Iterable[tuple[int, dict[str, Any]]]:
        items = read_json(self.path)
        if not isinstance(items, list):
            raise ValueError(f"{self.path}: expected a list of records, got {type(items).__name__}")
        return enumerate(items)

    def sample(self, record: tuple[int, dict[str, Any]]) -> Sample:
        number, item = record
        where = f"{self.path}: record {number}"
        turns = field(item, "conversations", list, where)
        if not turns:
            raise ValueError(f"{where}: key 'conversations' is empty")
        if isinstance(item.get("id"), (str, int)):
            where += f" (id {item['id']!r})"
        media = self._media(item.get("image"), where)
        messages, used = [], 0
        for turn in turns:
            role = field(turn, "from", str, where)
            text = field(turn, "value", str, where)
            if role not in ROLES:
                raise ValueError(f"{where}: key 'from': expected one of {', '.join(ROLES)}, got {role!r}")
            content: Any = text
            if media and ROLES[role] == "user" and MARK in text:
                content = _split(text, used)
                used += text.count(MARK)
            messages.append({"role": ROLES[role], "content": content})
        if used != len(media):
            raise ValueError(f"{where}: {len(media)} images but {used} {MARK!r} in human turns; there must be as many")
        meta = {key: item[key] for key in ("id", "data_source") if key in item}
        return Sample(f"llava_{number:08d}", messages, media, meta=meta)

    def _media(self, names: Any, where: str) -> list[Media]:
        if names is None:
            return []
        listed = names if isinstance(names, list) else [names]
        return [media_file(self.images, name, f"{where}: key 'image'", "image") for name in listed]


def _split(text: str, first: int) -> list[dict[str, Any]]:
    """Parts of a turn, with image `first` at the first mark. The line break that sets a mark off goes with it."""
    parts: list[dict[str, Any]] = []
    pieces = text.split(MARK)
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append({"type": "image", "media": first + index - 1})
            piece = piece.removeprefix("\n")
        if index < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
