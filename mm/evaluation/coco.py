"""COCO's captions, in the two forms in which they are published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.datasets.source import field, media_file, read_json
from mm.types import Media


@dataclass(frozen=True)
class CaptionedImage:
    id: int
    media: Media
    captions: list[str]


def read_captions(path: Path, images: Path, split: str) -> list[CaptionedImage]:
    """The images of a file that have captions, in the file's order.

    The official form has "images" [{"id", "file_name"}] and "annotations" [{"image_id", "caption"}]; Karpathy's has
    "images" [{"cocoid" or "imgid", "filepath", "filename", "split", "sentences": [{"raw"}]}], of which `split` is kept.
    Raises ValueError naming file, entry and key.
    """
    data = read_json(path)
    listed = field(data, "images", list, str(path))
    karpathy = bool(listed) and isinstance(listed[0], dict) and "sentences" in listed[0]
    found = _karpathy(path, images, split, listed) if karpathy else _official(path, images, listed, data)
    if not found:
        raise ValueError(f"{path}: no image with captions" + (f" in the split {split!r}" if karpathy else ""))
    return found


def _karpathy(path: Path, images: Path, split: str, listed: list[Any]) -> list[CaptionedImage]:
    found = []
    for index, item in enumerate(listed):
        where = f"{path}: image {index}"
        if field(item, "split", str, where) != split:
            continue
        name = "/".join(filter(None, (item.get("filepath"), field(item, "filename", str, where))))
        captions = [field(sentence, "raw", str, where) for sentence in field(item, "sentences", list, where)]
        number = field(item, "cocoid" if "cocoid" in item else "imgid", int, where)
        found.append(CaptionedImage(number, media_file(images, name, where, "image"), captions))
    return found


def _official(path: Path, images: Path, listed: list[Any], data: dict[str, Any]) -> list[CaptionedImage]:
    names: dict[int, str] = {}
    for index, item in enumerate(listed):
        where = f"{path}: image {index}"
        names[field(item, "id", int, where)] = field(item, "file_name", str, where)
    captions: dict[int, list[str]] = {}
    for index, item in enumerate(field(data, "annotations", list, str(path))):
        where = f"{path}: annotation {index}"
        image = field(item, "image_id", int, where)
        if image not in names:
            raise ValueError(f"{where}: no image with id {image}")
        captions.setdefault(image, []).append(field(item, "caption", str, where))
    return [
        CaptionedImage(number, media_file(images, names[number], f"{path}: image {number}", "image"), captions[number])
        for number in names
        if number in captions
    ]
