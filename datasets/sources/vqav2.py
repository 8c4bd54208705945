"""VQAv2: question and annotation JSON files with a folder of COCO images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mm.datasets.source import Question, Source, branched, field, media_file, read_json, sha256_file, single
from mm.types import Sample


class Asked(NamedTuple):
    question: dict[str, Any]
    annotation: dict[str, Any] | None


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
        data = read_json(self.questions)
        items = field(data, "questions", list, str(self.questions))
        subtype = str(data.get("data_subtype", ""))
        folder = self._image_folder(subtype)
        annotations = self._read_annotations()
        grouped: dict[int, list[Asked]] = {}
        for index, item in enumerate(items):
            where = f"{self.questions}: question {index}"
            number, image = field(item, "question_id", int, where), field(item, "image_id", int, where)
            field(item, "question", str, where)
            if annotations is not None and number not in annotations:
                raise ValueError(f"{self.annotations}: no annotation with question_id {number}")
            group = image if self.branches and annotations else index
            grouped.setdefault(group, []).append(Asked(item, annotations[number] if annotations else None))
        for asked in grouped.values():
            image = asked[0].question["image_id"]
            yield Record(image, str(folder), self.image_name.format(subtype=subtype, image_id=image), asked)

    def sample(self, record: Record) -> Sample:
        where = f"{self.questions}: image_id {record.image_id}"
        media = [media_file(Path(record.folder), record.file, where, "image")]
        meta = {"image_id": record.image_id}
        questions = [_question(asked, str(self.annotations)) for asked in record.asked]
        if self.branches and questions[0].answer is not None:
            return branched(f"vqav2_{record.image_id:012d}", media, questions, meta)
        [question] = questions
        return single(f"vqav2_q{question.meta['question_id']:012d}", media, question, meta)

    def _official_annotations(self) -> Path | None:
        name = self.questions.name.replace("OpenEnded_", "").replace("questions.json", "annotations.json")
        path = self.questions.with_name(name)
        return path if path.is_file() else None

    def _image_folder(self, subtype: str) -> Path:
        if self.images is not None:
            tried = [self.images]
        else:
            tried = [self.questions.parent / name for name in (subtype, "images") if name]
        for folder in tried:
            if folder.is_dir():
                return folder
        raise ValueError(f"{self.questions}: no folder of images {' or '.join(map(str, tried))}; set images=DIR")

    def _read_annotations(self) -> dict[int, dict[str, Any]] | None:
        """question_id -> annotation; None where there is no annotations file."""
        if self.annotations is None:
            return None
        items = field(read_json(self.annotations), "annotations", list, str(self.annotations))
        where = f"{self.annotations}: annotation"
        return {field(item, "question_id", int, f"{where} {index}"): item for index, item in enumerate(items)}


def _question(asked: Asked, file: str) -> Question:
    question, annotation = asked
    number = question["question_id"]
    if annotation is None:
        return Question(question["question"], None, {"question_id": number})
    where = f"{file}: question_id {number}"
    answers = field(annotation, "answers", list, where)
    meta = {
        "question_id": number,
        "category": field(annotation, "answer_type", str, where),
        "question_type": field(annotation, "question_type", str, where),
        "answers": [field(answer, "answer", str, where) for answer in answers],
    }
    return Question(question["question"], field(annotation, "multiple_choice_answer", str, where), meta)
