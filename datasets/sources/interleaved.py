"""Documents with images between their paragraphs (MMC4, OBELICS): JSONL beside a folder of images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mm.datasets.source import Line, Source, field, fingerprint_file, lines, media_file
from mm.types import Media, Sample


class Interleaved(Source[tuple[int, Line]]):
    """Web documents in the format of MMC4 (Zhu et al., 2023) or OBELICS (Laurencon et al., 2023), one a line.

    MMC4     {"text_list": [text], "image_info": [{"image_name", "matched_text_index"}]}: an image stands before the
             text that it is matched with
    OBELICS  {"texts": [text or null], "images": [file or null]}: two lists of one length, one of the two null at each
             place. A URL stands for the file of its last part

    The document is said by the assistant, so that all of its text is learned; images are slots in it. "url", "metadata"
    and "general_metadata" go to meta.

    Args:
        path: the JSONL file.
        images: the folder of images; by default `images` beside the file, or else the file's own.
        missing: "error", or "skip" to leave out images whose file is not there (links die).
    """

    def __init__(self, path: Path, images: Path | None = None, missing: str = "error") -> None:
        if missing not in ("error", "skip"):
            raise ValueError(f"interleaved: missing must be error or skip, got {missing!r}")
        beside = path.parent / "images"
        self.path, self.missing = path, missing
        self.images = images or (beside if beside.is_dir() else path.parent)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.suffix != ".jsonl" or not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.readline(1 << 16)
        return b'"text_list"' in head or (b'"texts"' in head and b'"images"' in head)

    def fingerprint(self) -> dict[str, str]:
        return {self.path.name: fingerprint_file(self.path)}

    def records(self) -> Iterable[tuple[int, Line]]:
        return enumerate(lines(self.path))

    def sample(self, record: tuple[int, Line]) -> Sample:
        number, line = record
        item, where = line.json(), line.where
        places = _mmc4(item, where) if "text_list" in item else _obelics(item, where)
        parts: list[dict[str, Any]] = []
        media: list[Media] = []
        for kind, value in places:
            if kind == "text":
                if value.strip():
                    parts.append({"type": "text", "text": value})
            elif self.missing == "error" or (self.images / value).is_file():
                parts.append({"type": "image", "media": len(media)})
                media.append(media_file(self.images, value, f"{where}: image", "image"))
        if not any(part["type"] == "text" for part in parts):
            raise ValueError(f"{where}: a document without text")
        meta = {name: item[name] for name in ("url", "metadata", "general_metadata") if item.get(name)}
        return Sample(f"interleaved_{number:08d}", [{"role": "assistant", "content": parts}], media, meta=meta)


def _mmc4(item: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """("text", paragraph) and ("image", file) in the order of the document."""
    before = defaultdict[int, list[str]](list)
    texts = field(item, "text_list", list, where)
    for info in field(item, "image_info", list, where):
        place = field(info, "matched_text_index", int, f"{where}: key 'image_info'")
        if not 0 <= place < len(texts):
            raise ValueError(f"{where}: key 'matched_text_index': {place}, but there are {len(texts)} texts")
        before[place].append(field(info, "image_name", str, f"{where}: key 'image_info'"))
    found: list[tuple[str, str]] = []
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{where}: key 'text_list': expected texts, got {text!r:.80}")
        found += [*(("image", name) for name in before[place]), ("text", text)]
    return found


def _obelics(item: dict[str, Any], where: str) -> list[tuple[str, str]]:
    texts, images = field(item, "texts", list, where), field(item, "images", list, where)
    if len(texts) != len(images):
        raise ValueError(f"{where}: {len(texts)} texts and {len(images)} images; there must be as many, with nulls")
    found: list[tuple[str, str]] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        value = image if text is None else text
        if (text is None) == (image is None) or not isinstance(value, str):
            raise ValueError(f"{where}: place {place}: expected a text or an image and null for the other")
        found.append(("image", _file(value)) if text is None else ("text", text))
    return found


def _file(name: str) -> str:
    return unquote(PurePosixPath(urlsplit(name).path).name) if "://" in name else name
