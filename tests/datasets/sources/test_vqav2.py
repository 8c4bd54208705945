"""VQAv2 questions and annotations."""

import json
from pathlib import Path

import pytest

from mm.datasets.sources.vqav2 import VQAv2


def dump(path: Path, value):
    path.write_text(json.dumps(value))
    return path


def parts(sample, index=0):
    return [part.get("text", part.get("media")) for part in sample.messages[index]["content"]]


def vqa(root, annotated=(0, 1, 2)):
    images = root / "val2014"
    images.mkdir()
    for number in (9, 8):
        (images / f"COCO_val2014_{number:012d}.jpg").write_bytes(b"jpeg")
    questions = [{"question_id": 10 + i, "image_id": image, "question": f"q{i}?"} for i, image in enumerate((9, 8, 9))]
    annotations = [
        {
            "question_id": 10 + i,
            "image_id": 9,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": f"a{i}",
            "answers": [{"answer": f"a{i}", "answer_confidence": "yes", "answer_id": n} for n in range(10)],
        }
        for i in annotated
    ]
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    data = {"data_subtype": "val2014", "questions": questions}
    return dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", data)


def test_vqav2(root):
    vqa(root)
    first, second = VQAv2(root)
    assert (first.meta["image_id"], first.meta["question_id"]) == (9, [10, 12])
    assert [[message["content"] for message in branch] for branch in first.branches] == [["q0?", "a0"], ["q2?", "a2"]]
    assert first.meta["answers"] == [["a0"] * 10, ["a2"] * 10]
    assert second.media[0].data == root / "val2014" / "COCO_val2014_000000000008.jpg"
    single = list(VQAv2(root, branches=False))
    assert [sample.meta["question_id"] for sample in single] == [10, 11, 12]
    assert parts(single[2]) == [0, "q2?"]
    assert single[2].messages[1]["content"] == "a2"
    assert (single[2].meta["category"], single[2].meta["question_type"]) == ("other", "what")


def test_vqav2_test_set_has_questions_only(root):
    vqa(root)
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    samples = list(VQAv2(root))
    assert len(samples) == 3
    assert [message["role"] for message in samples[0].messages] == ["user"]


def test_vqav2_bad_input(root):
    file = vqa(root, annotated=(0, 2))
    with pytest.raises(ValueError, match=r"annotations\.json: no annotation with question_id 11"):
        list(VQAv2(root))
    with pytest.raises(ValueError, match="no folder of images .*nowhere; set images=DIR"):
        list(VQAv2(file, images=root / "nowhere"))
    with pytest.raises(ValueError, match=r"image_id 9: no file .*/9\.jpg"):
        list(VQAv2(dump(root / "x_questions.json", json.loads(file.read_text())), image_name="{image_id}.jpg"))
    with pytest.raises(ValueError, match=r"expected one \*questions\.json, found v2_.*, x_questions\.json"):
        VQAv2(root)
    with pytest.raises(ValueError, match=r"question 0: key 'question_id': expected int, got 'x'"):
        list(VQAv2(dump(file, {"data_subtype": "val2014", "questions": [{"question_id": "x"}]})))
