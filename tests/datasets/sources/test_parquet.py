"""Hugging Face parquet files: embedded media, class labels, chats; rows are read where they lie."""

import json
import pickle

import pytest

from mm.datasets.catalog import open_source
from mm.datasets.parquet import Rows
from mm.datasets.shards import write_shards
from mm.datasets.sources.parquet import Parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PNG, JPG, WAV = b"\x89PNG....", b"\xff\xd8\xff...", b"RIFF....WAVE"


def write(path, rows, features=None, **options):
    table = pa.Table.from_pylist(rows)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def image(data=PNG, path=None):
    return {"bytes": data, "path": path}


def test_captions_of_images(root):
    source = open_source(str(write(root / "train-0.parquet", [{"image": image(), "caption": "a cat", "id": 7}])))
    assert isinstance(source, Parquet)
    [sample] = source
    assert sample.messages == [
        {"role": "user", "content": [{"type": "image", "media": 0}]},
        {"role": "assistant", "content": "a cat"},
    ]
    assert sample.media[0].name == "image_0.png"
    assert sample.meta == {"id": 7}


def test_class_labels_are_written_as_their_names(root):
    features = {"label": {"names": ["cat", "hot dog"], "_type": "ClassLabel"}}
    path = write(root / "x.parquet", [{"image": image(JPG), "label": 1}], features)
    [sample] = Parquet(path)
    assert sample.messages[1]["content"] == "hot dog"
    assert sample.media[0].name == "image_0.jpg"
    with pytest.raises(ValueError, match=r"x\.parquet: row 0: column 'label': 1 is not the number of a class"):
        list(Parquet(write(path, [{"image": image(), "label": 1}])))


def test_sounds_questions_and_files_beside(root):
    rows = [
        {"audio": image(WAV, "a.wav"), "question": "what?", "answer": "a bell", "extra": 3},
        {"audio": None, "question": "who?", "answer": None, "extra": 4},
    ]
    first, second = Parquet(write(root / "x.parquet", rows), keep=("extra",))
    assert first.messages[0]["content"] == [{"type": "audio", "media": 0}, {"type": "text", "text": "what?"}]
    assert first.meta == {"extra": 3, "question": "what?", "answers": ["a bell"]}
    assert [message["role"] for message in second.messages] == ["user"]
    [beside] = Parquet(write(root / "y.parquet", [{"image": {"bytes": None, "path": "a.png"}, "text": "x"}]))
    assert beside.media[0].data == root / "a.png"
    with pytest.raises(ValueError, match="lies outside"):
        list(Parquet(write(root / "z.parquet", [{"image": {"bytes": None, "path": "/etc/passwd"}, "text": "x"}])))


def test_chats_in_three_spellings(root):
    pictures = [image(), image(JPG)]
    for turns in (
        [{"role": "user", "content": "see <image>and <image>?"}, {"role": "assistant", "content": "yes"}],
        [{"from": "human", "value": "see <image>and <image>?"}, {"from": "gpt", "value": "yes"}],
        [{"user": "see <image>and <image>?", "assistant": "yes"}],
    ):
        [sample] = Parquet(write(root / "x.parquet", [{"images": pictures, "conversations": turns}]))
        kinds = [part["type"] for part in sample.messages[0]["content"]]
        assert kinds == ["text", "image", "text", "image", "text"]
        assert sample.messages[1] == {"role": "assistant", "content": "yes"}
    [plain] = Parquet(write(root / "x.parquet", [{"images": pictures, "texts": [{"user": "hm", "assistant": "yes"}]}]))
    assert [part["type"] for part in plain.messages[0]["content"]] == ["image", "image", "text"]
    turns = [{"user": "one <image>", "assistant": "yes"}]
    with pytest.raises(ValueError, match="2 media but 1 marks"):
        list(Parquet(write(root / "x.parquet", [{"images": pictures, "texts": turns}])))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"image": image(b"text"), "text": "a"}, {}, "row 0: column 'image': not image of a known format"),
        ({"image": image(), "text": None}, {}, "row 0: nothing is said in it"),
        ({"image": image(), "text": 5}, {}, "column 'text': "),
        ({"image": image()}, {}, "no column of image holds text; set text=NAME"),
        ({"image": image(), "words": "a"}, {"text": "word"}, "text=word: no such column; there are: image, words"),
    ],
)
def test_bad_rows_and_columns(root, row, options, message):
    with pytest.raises(ValueError, match=message):
        list(Parquet(write(root / "x.parquet", [row]), **options))


def test_files_that_are_not_parquet(root):
    (root / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"x\.parquet: not a parquet file"):
        Parquet(root / "x.parquet")
    with pytest.raises(ValueError, match="no parquet file whose name begins with 'test'"):
        Parquet(root, split="test")


def test_rows_are_read_in_any_order_over_groups_and_files(root):
    for name, start in (("a", 0), ("b", 50)):
        write(root / f"{name}.parquet", [{"text": f"t{n}"} for n in range(start, start + 50)], row_group_size=20)
    rows = Rows(sorted(root.glob("*.parquet")))
    places = list(rows)
    assert [place.total for place in places[48:52]] == [48, 49, 0, 1]
    copy = pickle.loads(pickle.dumps(rows))
    for number in (0, 1, 17, 16, 99, 50, 3, 39, 40):
        assert copy.read(places[number]) == {"text": f"t{number}"}
    manifest = write_shards(Parquet(root), root / "out", samples_per_shard=7)
    assert manifest["samples"] == 100
