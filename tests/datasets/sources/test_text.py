"""Plain text, JSONL corpora and interleaved documents."""

import gzip
import json

import pytest

from mm.datasets.catalog import open_source
from mm.datasets.shards import write_shards
from mm.datasets.sources.interleaved import Interleaved
from mm.datasets.sources.text import Text


def said(source):
    return [sample.messages[0]["content"] for sample in source]


def test_files_and_lines(root):
    (root / "b.txt").write_text("\ufeffsecond\ndocument\n", encoding="utf-8")
    (root / "a.txt").write_text("first <image>\n\nstill first")
    with gzip.open(root / "c.txt.gz", "wt") as file:
        file.write("third")
    assert said(Text(root)) == ["first <image>\n\nstill first", "second\ndocument", "third"]
    assert said(Text(root, by="line")) == ["first <image>", "still first", "second", "document", "third"]
    [sample] = Text(root / "b.txt")
    assert sample.messages == [{"role": "assistant", "content": "second\ndocument"}]
    assert said(open_source(str(root / "a.txt"), by="line"))[1] == "still first"


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_jsonl(root, name):
    rows = [{"text": "one", "language": "en", "score": 3}, {"text": "zwei\nzeilen", "lang": "de"}]
    data = "\n\n".join(map(json.dumps, rows)).encode()
    (root / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = open_source(str(root / name))
    assert isinstance(source, Text)
    assert said(source) == ["one", "zwei\nzeilen"]
    assert [sample.meta for sample in source] == [{"language": "en"}, {"lang": "de"}]
    assert [sample.meta for sample in Text(root / name, keep=("score",))][0] == {"language": "en", "score": 3}
    assert said(Text(root / name, key="text")) == ["one", "zwei\nzeilen"]
    with pytest.raises(ValueError, match=rf"{name}: line 3: key 'body': expected text, got None"):
        source = Text(root / name, key="body")
        source.sample(list(source.records())[1])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n[1]', "line 2: expected an object"),
        ("x.jsonl", b'{"text": "a"}\n{"text": " "}', "line 2: no text"),
        ("x.jsonl", b'{"text": "a"}\n\xff', "line 2: not UTF-8"),
        ("x.txt", b"caf\xe9", r"x\.txt: not UTF-8 text \(byte 3\)"),
        ("x.txt", b"", "x.txt: no text"),
    ],
)
def test_bad_documents_are_named_and_quarantined(root, name, data, message):
    (root / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(Text(root / name))
    if data.count(b"\n"):
        manifest = write_shards(Text(root / name), root / "out", max_bad=0.5)
        assert (manifest["samples"], manifest["quarantined"]) == (1, 1)


def test_what_is_no_text(root):
    with pytest.raises(ValueError, match="no text file"):
        Text(root / "nowhere")
    with pytest.raises(ValueError, match="not a text file"):
        Text(root / "a.png")
    with pytest.raises(ValueError, match="by must be file or line"):
        Text(root, by="word")  # type: ignore[arg-type]


MMC4 = {
    "url": "https://a.b",
    "text_list": ["first", "second"],
    "image_info": [
        {"image_name": "a.png", "matched_text_index": 1},
        {"image_name": "gone.png", "matched_text_index": 0},
    ],
}
OBELICS = {
    "texts": [None, "said", None, "more"],
    "images": ["https://x.y/dir/a.png?w=3", None, "gone.png", None],
    "metadata": "m",
}


def document(root, *items):
    (root / "docs.jsonl").write_text("\n".join(map(json.dumps, items)))
    return root / "docs.jsonl"


def test_interleaved(root):
    source = open_source(str(document(root, MMC4, OBELICS)), missing="skip", images=root)
    assert isinstance(source, Interleaved)
    first, second = source
    image = {"type": "image", "media": 0}
    text = lambda value: {"type": "text", "text": value}  # noqa: E731
    assert first.messages == [{"role": "assistant", "content": [text("first"), image, text("second")]}]
    assert second.messages == [{"role": "assistant", "content": [image, text("said"), text("more")]}]
    assert first.media[0].name == second.media[0].name == "a.png"
    assert (first.meta, second.meta) == ({"url": "https://a.b"}, {"metadata": "m"})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (MMC4, "line 1: image: no file .*gone.png"),
        (
            {**MMC4, "image_info": [{"image_name": "a.png", "matched_text_index": 2}]},
            "matched_text_index': 2, but .* 2",
        ),
        ({**MMC4, "text_list": [3], "image_info": []}, "key 'text_list': expected texts, got 3"),
        ({**OBELICS, "images": [None]}, "4 texts and 1 images"),
        ({"texts": ["a"], "images": ["b"]}, "place 0: expected a text or an image"),
        ({"texts": [None], "images": ["a.png"]}, "a document without text"),
        ({"texts": [None, "a"], "images": ["../../etc/passwd", None]}, "lies outside"),
    ],
)
def test_interleaved_bad_input(root, item, message):
    with pytest.raises(ValueError, match=message):
        list(Interleaved(document(root, item), images=root))
