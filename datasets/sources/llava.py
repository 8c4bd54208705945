"""LLaVA JSON (LLaVA-1.5, LLaVA-OneVision, ShareGPT): conversations with marks where media stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mm.datasets.source import (
    Line,
    Source,
    field,
    fingerprint_file,
    lines,
    marked_parts,
    media_file,
    read_items,
)
from mm.types import KINDS, Kind, Media, Sample

MARKS: dict[str, Kind] = {"<image>": "image", "<video>": "video", "<audio>": "audio"}
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
KEPT = ("id", "data_source", "source", "language", "lang")


class LLaVA(Source[tuple[int, Any]]):
    """Chats in the format of LLaVA-1.5 (Liu et al., 2023), LLaVA-OneVision (Li et al., 2024) and ShareGPT.

    A JSON list or JSONL of {"id", "image", "video", "audio", "conversations": [{"from", "value"}]}. Other spellings of
    the same: "images", "videos", "audios"; "messages" of {"role", "content"}; a "system" text beside them. The speaker
    is human or user, gpt or assistant (chatgpt, bing, bard, model), or system.

    A medium is a file name, a list of them, or absent. Only here, where the format says so, does text hold marks: each
    "<image>" in a record's human turns becomes the next of its images, in place, and so for "<video>" and "<audio>". In
    a record without such media, and in what the assistant says, they are ordinary text.

    Args:
        path: the file.
        images: the folder of the media; by default the file's own.
    """

    def __init__(self, path: Path, images: Path | None = None) -> None:
        self.path = path
        self.images = images or path.parent
        if not self.images.is_dir():
            raise ValueError(f"llava: no folder of images {self.images}")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.suffix not in (".json", ".jsonl") or not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(1 << 16)
        start = b"{" if path.suffix == ".jsonl" else b"["
        return head.lstrip()[:1] == start and b'"conversations"' in head

    def fingerprint(self) -> dict[str, str]:
        return {self.path.name: fingerprint_file(self.path)}

    def records(self) -> Iterable[tuple[int, Any]]:
        return enumerate(lines(self.path) if self.path.suffix == ".jsonl" else self._items())

    def _items(self) -> Iterator[Any]:
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        with self.path.open("rb") as file:
            start = file.read(1 << 16).lstrip()[:1]
        if start == b"{":
            raise ValueError(f"{self.path}: expected a list of records, got dict")
        yield from read_items(self.path)

    def sample(self, record: tuple[int, Any]) -> Sample:
        number, item = record
        where = f"{self.path}: record {number}"
        if isinstance(item, Line):
            item = item.json()
        key = "messages" if isinstance(item, dict) and "conversations" not in item and "messages" in item else None
        turns = field(item, key or "conversations", list, where)
        if not turns:
            raise ValueError(f"{where}: key {key or 'conversations'!r} is empty")
        if isinstance(item.get("id"), (str, int)):
            where += f" (id {item['id']!r})"
        media = [medium for kind in KINDS for medium in self._media(item, kind, where)]
        messages, used = list[dict[str, Any]](), dict[str, int]()
        if isinstance(item.get("system"), str) and item["system"]:
            messages.append({"role": "system", "content": item["system"]})
        for turn in turns:
            role, text = _turn(turn, key is not None, where)
            content = marked_parts(text, MARKS, used, media) if role == "user" else text
            messages.append({"role": role, "content": content})
        for kind in KINDS:
            there, marked = sum(medium.kind == kind for medium in media), used.get(kind, 0)
            if marked != there:
                raise ValueError(
                    f"{where}: {there} {kind}s but {marked} '<{kind}>' in human turns; there must be as many"
                )
        meta = {name: item[name] for name in KEPT if name in item}
        return Sample(f"llava_{number:08d}", messages, media, meta=meta)

    def _media(self, item: dict[str, Any], kind: Kind, where: str) -> Iterator[Media]:
        for name in (kind, f"{kind}s"):
            value = item.get(name)
            for file in value if isinstance(value, list) else [value]:
                if file is not None:
                    yield media_file(self.images, file, f"{where}: key {name!r}", kind)


def _turn(turn: Any, named: bool, where: str) -> tuple[str, str]:
    """(role, text) of a turn in either spelling."""
    who, what = ("role", "content") if named else ("from", "value")
    speaker, text = field(turn, who, str, where), field(turn, what, str, where)
    if speaker not in ROLES:
        raise ValueError(f"{where}: key {who!r}: expected one of {', '.join(ROLES)}, got {speaker!r}")
    return ROLES[speaker], text
