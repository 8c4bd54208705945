"""VQAv2: question and annotation JSON files with a folder of COCO images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mm.datasets.source import (
    Question,
    Source,
    branched,
    field,
    media_file,
    read_items,
    read_value,
    sha256_file,
    single,
)
from mm.types import Sample


class Asked(NamedTuple):
    number: int  # question_id
    question: str
    annotation: bytes | None  # JSON of what is needed of it: all of a split's fit into memory then


class Record(NamedTuple):
    image_id: int
    folder: str
    file: str
    asked: list[Asked]


class VQAv2(Source[Record]):
    """Questions about images with ten answers each, in the format of VQA v2 (Goyal et al., 2017; visualqa.org).

    The answer to learn is `multiple_choice_answer`; all ten stand in `meta["answers"]`, for the official score.

    Args:
        path: the questions file `*questions.json`, or a folder with one of them.
        annotations: the annotations file; by default the questions file's name with "annotations" for "OpenEnded" and
            "questions" (the official names), if there is one. Without it the questions have no answers: a test set.
        images: the folder of images; by default the one beside the questions file that is named as the data's subtype
            ("val2014"), or else "images".
        image_name: an image's file name, from `{image_id}` and `{subtype}`.
        branches: one sample an image with a branch a question; False gives one sample a question, in the file's order.
    """

    def __init__(
        self,
        path: Path,
        annotations: Path | None = None,
        images: Path | None = None,
        image_name: str = "COCO_{subtype}_{image_id:012d}.jpg",
        branches: bool = True,
    ) -> None:
        found = sorted(path.glob("*questions.json")) if path.is_dir() else [path]
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(f"{path}: expected one *questions.json, found {names}; give the file itself")
        self.questions = found[0]
        self.annotations = annotations or self._official_annotations()
        self.images = images
        self.image_name = image_name
        self.branches = branches

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.name.endswith("questions.json") or any(path.glob("*questions.json"))

    def fingerprint(self) -> dict[str, str]:
        return {file.name: sha256_file(file) for file in (self.questions, self.annotations) if file is not None}

    def records(self) -> Iterable[Record]:
        subtype = str(read_value(self.questions, "data_subtype", ""))
        folder = self._image_folder(subtype)
        annotations = self._read_annotations()
        grouped: dict[int, list[tuple[int, Asked]]] = {}
        for index, item in enumerate(read_items(self.questions, "questions")):
            where = f"{self.questions}: question {index}"
            number, image = field(item, "question_id", int, where), field(item, "image_id", int, where)
            question = field(item, "question", str, where)
            if annotations is not None and number not in annotations:
                raise ValueError(f"{self.annotations}: no annotation with question_id {number}")
            group = image if self.branches and annotations else index
            grouped.setdefault(group, []).append(
                (image, Asked(number, question, annotations[number] if annotations else None))
            )
        for members in grouped.values():
            image, asked = members[0][0], [one for _, one in members]
            yield Record(image, str(folder), self.image_name.format(subtype=subtype, image_id=image), asked)

    def sample(self, record: Record) -> Sample:
        where = f"{self.questions}: image_id {record.image_id}"
        media = [media_file(Path(record.folder), record.file, where, "image")]
        meta = {"image_id": record.image_id}
        questions = [_question(asked) for asked in record.asked]
        if self.branches and questions[0].answer is not None:
            return branched(f"vqav2_{record.image_id:012d}", media, questions, meta)
        [question] = questions
        return single(f"vqav2_q{question.meta['question_id']:012d}", media, question, meta)

    def _official_annotations(self) -> Path | None:
        name = self.questions.name.replace("OpenEnded_", "").replace("questions.json", "annotations.json")
        path = self.questions.with_name(name)
        return path if path != self.questions and path.is_file() else None

    def _image_folder(self, subtype: str) -> Path:
        if self.images is not None:
            tried = [self.images]
        else:
            tried = [self.questions.parent / name for name in (subtype, "images") if name]
        for folder in tried:
            if folder.is_dir():
                return folder
        raise ValueError(f"{self.questions}: no folder of images {' or '.join(map(str, tried))}; set images=DIR")

    def _read_annotations(self) -> dict[int, bytes] | None:
        """question_id -> what `_question` reads of its annotation; None where there is no annotations file."""
        if self.annotations is None:
            return None
        found = {}
        for index, item in enumerate(read_items(self.annotations, "annotations")):
            number = field(item, "question_id", int, f"{self.annotations}: annotation {index}")
            where = f"{self.annotations}: question_id {number}"
            needed = {
                "answer": field(item, "multiple_choice_answer", str, where),
                "category": field(item, "answer_type", str, where),
                "question_type": field(item, "question_type", str, where),
                "answers": [field(one, "answer", str, where) for one in field(item, "answers", list, where)],
            }
            found[number] = json.dumps(needed).encode()
        return found


def _question(asked: Asked) -> Question:
    if asked.annotation is None:
        return Question(asked.question, None, {"question_id": asked.number})
    annotation = json.loads(asked.annotation)
    answer = annotation.pop("answer")
    return Question(asked.question, answer, {"question_id": asked.number, **annotation})
