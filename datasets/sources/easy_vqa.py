"""easy-VQA: 64x64 images of one coloured shape with about ten questions each (PyPI package easy-vqa, MIT)."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mm.datasets.source import Question, Source, branched, single
from mm.types import Media, Sample


class Record(NamedTuple):
    image_id: int
    path: str
    number: int | None  # of the question, if it stands alone
    questions: list[tuple[str, str]]


class EasyVQA(Source[Record]):
    """easy-VQA 1.0 (https://github.com/vzhou842/easy-VQA) from the installed package: 4,000 + 1,000 images.

    Args:
        split: "train" (38,575 questions) or "test" (9,673), the author's own.
        branches: one sample an image with a branch a question; False gives one sample a question, in the file's order.
        captions: instead of questions, one sample an image with the caption that its own answers make ("a red circle");
            images whose questions do not tell both the colour and the shape are left out.
    """

    def __init__(
        self, split: Literal["train", "test"] = "train", branches: bool = True, captions: bool = False
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"easy_vqa: split must be train or test, got {split!r}")
        self.split = split
        self.branches = branches
        self.captions = captions

    def records(self) -> Iterable[Record]:
        import easy_vqa

        train = self.split == "train"
        texts, answers, images = (easy_vqa.get_train_questions if train else easy_vqa.get_test_questions)()
        paths: dict[int, str] = (easy_vqa.get_train_image_paths if train else easy_vqa.get_test_image_paths)()
        if not self.branches and not self.captions:
            for number, (text, answer, image) in enumerate(zip(texts, answers, images, strict=True)):
                yield Record(image, paths[image], number, [(text, answer)])
            return
        grouped: dict[int, list[tuple[str, str]]] = {image: [] for image in sorted(paths)}
        for text, answer, image in zip(texts, answers, images, strict=True):
            grouped[image].append((text, answer))
        for image, questions in grouped.items():
            if self.captions and caption(questions) is None:
                continue
            yield Record(image, paths[image], None, questions)

    def sample(self, record: Record) -> Sample:
        media = [Media("image", Path(record.path).read_bytes(), f"{record.image_id}.png")]
        meta: dict[str, Any] = {"image_id": record.image_id}
        if self.captions:
            text = caption(record.questions)
            messages = [
                {"role": "user", "content": [{"type": "image", "media": 0}]},
                {"role": "assistant", "content": text},
            ]
            return Sample(f"easy_vqa_{self.split}_caption_{record.image_id:06d}", messages, media, meta=meta)
        if record.number is None:
            questions = [Question(q, a, {"question_types": category(q)}) for q, a in record.questions]
            return branched(f"easy_vqa_{self.split}_{record.image_id:06d}", media, questions, meta)
        [(text, answer)] = record.questions
        question = Question(text, answer, {"answers": [answer], "category": category(text)})
        return single(f"easy_vqa_{self.split}_q{record.number:06d}", media, question, meta)

    def fingerprint(self) -> dict[str, str]:
        return {"easy-vqa": version("easy-vqa")}


def caption(questions: list[tuple[str, str]]) -> str | None:
    """ "a COLOUR SHAPE" from the answers about an image; None where they do not tell both."""
    told = {category(question): answer for question, answer in questions}
    return f"a {told['color']} {told['shape']}" if "color" in told and "shape" in told else None


def category(question: str) -> str:
    """The kind of an easy-VQA question: "color", "shape" or "yes/no"."""
    if question.startswith(("what color", "what is the color")):
        return "color"
    return "shape" if question.startswith("what") else "yes/no"
