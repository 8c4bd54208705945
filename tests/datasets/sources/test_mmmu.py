"""MMMU parquet files."""

import io

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mm.datasets.catalog import open_source
from mm.datasets.sources.mmmu import MMMU


def png(color=(255, 0, 0)):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "png")
    return buffer.getvalue()


def parts(sample, index=0):
    return [part.get("text", part.get("media")) for part in sample.messages[index]["content"]]


def mmmu_row(**changes):
    row = {
        "id": "validation_Art_Theory_1",
        "question": "Look at <image 1>: what does <image 1> show?",
        "options": "['a cat', '<image 2>']",
        "explanation": "",
        "image_1": {"bytes": png(), "path": "1.png"},
        "image_2": {"bytes": b"\xff\xd8\xff rest", "path": None},
        "image_3": {"bytes": png(), "path": None},
        "img_type": "['Paintings']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Art",
    }
    return {**row, **changes}


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_mmmu(root):
    (root / "Art").mkdir()
    opened = mmmu_row(id="validation_Math_2", question_type="open", options="[]", answer="['24/7', '3.429']")
    hidden = mmmu_row(id="test_Math_3", answer="?", image_2={"bytes": png(), "path": None})
    parquet(root / "Art" / "validation-00000-of-00001.parquet", [mmmu_row(), opened])
    parquet(root / "Art" / "test-00000-of-00001.parquet", [hidden])
    choice, free = MMMU(root, split="validation")
    assert parts(choice) == [
        "Look at ",
        0,
        ": what does <image 1> show?\n(A) a cat\n(B) ",
        1,
        "\n\nAnswer with the option's letter from the given choices directly.",
    ]
    assert [item.name for item in choice.media] == ["image_1.png", "image_2.jpg"]  # nothing marks the third
    assert choice.messages[1]["content"] == "B"
    assert choice.key == "mmmu_validation_Art_Theory_1"
    assert choice.meta["category"] == "Art_Theory"
    assert choice.meta["all_choices"] == ["A", "B"]
    assert choice.meta["index2ans"] == {"A": "a cat", "B": "<image 2>"}
    assert free.meta["answers"] == ["24/7", "3.429"]
    assert free.messages[1]["content"] == "24/7"
    assert parts(free)[-1].endswith("show?\nAnswer the question using a single word or phrase.")
    [test] = MMMU(root, split="test", hint=False)
    assert [message["role"] for message in test.messages] == ["user"]
    assert len(list(MMMU(root))) == 3
    assert isinstance(open_source(str(root)), MMMU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_1": None}, "column 'image_1': expected image bytes, got None"),
        ({"image_1": {"bytes": b"text", "path": ""}}, "column 'image_1': not image of a known format"),
        ({"options": "[open"}, "column 'options': expected a list as text"),
        ({"options": "__import__('os')"}, "column 'options': expected a list as text"),
        ({"answer": None}, "key 'answer': expected str, got None"),
    ],
)
def test_mmmu_names_file_row_and_column(root, changes, message):
    file = parquet(root / "x.parquet", [mmmu_row(), mmmu_row(**changes)])
    with pytest.raises(ValueError, match=message) as caught:
        list(MMMU(file))
    assert str(caught.value).startswith(f"{file}: row 1 (validation_Art_Theory_1): ")


def test_mmmu_bad_files(root):
    with pytest.raises(ValueError, match="no parquet file"):
        MMMU(root)
    (root / "x.parquet").write_bytes(b"not parquet, but long enough to look")
    with pytest.raises(ValueError, match=r"x\.parquet: not a parquet file"):
        list(MMMU(root))
    parquet(root / "x.parquet", [{"id": "a"}])
    with pytest.raises(ValueError, match=r"x\.parquet: column 'question' is missing"):
        list(MMMU(root))
    with pytest.raises(ValueError, match="begins with 'dev'"):
        MMMU(root, split="dev")
