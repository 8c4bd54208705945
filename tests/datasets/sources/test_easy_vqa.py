"""The easy-vqa package, whole and as samples."""

import io
from collections import Counter

import pytest
from PIL import Image

from mm.datasets.sources.easy_vqa import EasyVQA, caption


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


def test_captions_are_made_of_the_images_own_answers():
    captions = {sample.meta["image_id"]: sample for sample in EasyVQA("test", captions=True)}
    asked = {sample.meta["image_id"]: sample for sample in EasyVQA("test")}
    assert 0 < len(captions) < len(asked)  # images whose questions do not tell both colour and shape are left out
    for image, sample in asked.items():
        told = {}
        for branch, kind in zip(sample.branches, sample.meta["question_types"], strict=True):
            told[kind] = branch[1]["content"]
        assert (image in captions) == ({"color", "shape"} <= set(told))
        if image in captions:
            assert captions[image].messages == [
                {"role": "user", "content": [{"type": "image", "media": 0}]},
                {"role": "assistant", "content": f"a {told['color']} {told['shape']}"},
            ]
            assert captions[image].media == sample.media and captions[image].branches == []
    assert len({sample.key for sample in captions.values()} & {sample.key for sample in asked.values()}) == 0


def test_a_caption_needs_both_answers():
    assert caption([("what color is the shape?", "red"), ("what shape is in the image?", "circle")]) == "a red circle"
    assert (
        caption([("what is the red shape?", "circle"), ("what is the color of the circle?", "red")]) == "a red circle"
    )
    assert caption([("what is the red shape?", "circle"), ("is there a red shape?", "yes")]) is None
    assert caption([]) is None
