"""COCO captions: captions_*.json with a folder of images, about five captions each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mm.datasets.source import Source, field, media_file, media_parts, read_items, sha256_file
from mm.types import Sample


class Record(NamedTuple):
    image_id: int
    folder: str
    file: str
    captions: list[tuple[int, str]]  # (annotation id, caption)


class COCOCaptions(Source[Record]):
    """Captions in the format of COCO (Chen et al., 2015).

    {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}

    Args:
        path: the annotations file.
        images: the folder of images; by default, for captions_NAME.json, the first there is of `NAME`, `../NAME` and
            `images` beside the file.
        branches: one sample an image with a branch a caption; False gives one sample a caption (contrastive training).
        prompt: what the user says after the image; "" says nothing.
    """

    def __init__(self, path: Path, images: Path | None = None, branches: bool = True, prompt: str = "") -> None:
        self.path = path
        self.images = images
        self.branches = branches
        self.prompt = prompt

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.name.startswith("captions_") and path.suffix == ".json"

    def fingerprint(self) -> dict[str, str]:
        return {self.path.name: sha256_file(self.path)}

    def records(self) -> Iterable[Record]:
        folder = str(self._image_folder())
        files: dict[int, str] = {}
        for index, item in enumerate(read_items(self.path, "images")):
            where = f"{self.path}: image {index}"
            files[field(item, "id", int, where)] = field(item, "file_name", str, where)
        captions: dict[int, list[tuple[int, str]]] = {image: [] for image in files}
        for index, item in enumerate(read_items(self.path, "annotations")):
            where = f"{self.path}: annotation {index}"
            image = field(item, "image_id", int, where)
            if image not in files:
                raise ValueError(f"{where}: no image with id {image}")
            captions[image].append((field(item, "id", int, where), field(item, "caption", str, where).strip()))
        for image, listed in captions.items():
            if self.branches and listed:
                yield Record(image, folder, files[image], listed)
            elif not self.branches:
                yield from (Record(image, folder, files[image], [caption]) for caption in listed)

    def sample(self, record: Record) -> Sample:
        where = f"{self.path}: image_id {record.image_id}: key 'file_name'"
        media = [media_file(Path(record.folder), record.file, where, "image")]
        content: list[dict[str, Any]] = media_parts(media)
        if self.prompt:
            content.append({"type": "text", "text": self.prompt})
        user = {"role": "user", "content": content}
        replies = [{"role": "assistant", "content": caption} for _, caption in record.captions]
        meta = {"image_id": record.image_id, "captions": [caption for _, caption in record.captions]}
        if not self.branches:
            return Sample(f"coco_caption_{record.captions[0][0]:012d}", [user, replies[0]], media, meta=meta)
        key = f"coco_{record.image_id:012d}"
        return Sample(key, [user], media, branches=[[reply] for reply in replies], meta=meta)

    def _image_folder(self) -> Path:
        if self.images is not None:
            tried = [self.images]
        else:
            name = self.path.stem.removeprefix("captions_")
            parent = self.path.parent
            tried = [parent / name, parent.parent / name, parent / "images"]
        for folder in tried:
            if folder.is_dir():
                return folder
        raise ValueError(f"{self.path}: no folder of images {' or '.join(map(str, tried))}; set images=DIR")
