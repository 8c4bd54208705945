"""The easy-vqa package, whole and as samples."""

import io
from collections import Counter

import pytest
from PIL import Image

from mm.datasets.sources.easy_vqa import EasyVQA


def picture(sample):
    """The first medium, opened."""
    return Image.open(io.BytesIO(sample.media[0].data))


def parts(sample, index=0):
    return [part.get("text", part.get("media")) for part in sample.messages[index]["content"]]


@pytest.mark.parametrize(("split", "images", "questions"), [("train", 4000, 38_575), ("test", 1000, 9_673)])
def test_easy_vqa_is_whole(split, images, questions):
    records = list(EasyVQA(split).records())
    assert len(records) == images
    assert sum(len(record.questions) for record in records) == questions
    assert len(list(EasyVQA(split, branches=False).records())) == questions


def test_easy_vqa_samples():
    sample = next(iter(EasyVQA("test")))
    assert sample.messages == [{"role": "user", "content": [{"type": "image", "media": 0}]}]
    assert sample.branches[0] == [
        {"role": "user", "content": "what is the red shape?"},
        {"role": "assistant", "content": "triangle"},
    ]
    assert sample.meta["question_types"][:2] == ["shape", "color"]
    assert picture(sample).size == (64, 64)
    single = next(iter(EasyVQA("test", branches=False)))
    assert parts(single) == [0, "what is the red shape?"]
    assert single.meta == {
        "image_id": 0,
        "question": "what is the red shape?",
        "answers": ["triangle"],
        "category": "shape",
    }
    kinds = Counter(s.meta["category"] for s in EasyVQA("test", branches=False))
    assert kinds["color"] + kinds["shape"] == 2537  # the questions that need the image
    with pytest.raises(ValueError, match="'val'"):
        EasyVQA("val")  # type: ignore[arg-type]
