"""LLaVA JSON."""

import json
from pathlib import Path

import pytest

from mm.datasets.sources.llava import LLaVA


def dump(path: Path, value):
    path.write_text(json.dumps(value))
    return path


def parts(sample, index=0):
    return [part.get("text", part.get("media")) for part in sample.messages[index]["content"]]


def turns(*values):
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def test_llava(root):
    records = [
        {"id": "x", "image": "a.png", "conversations": turns("<image>\nwhat?", "a <image> cat", "and?", "no")},
        {"id": 2, "image": ["a.png", "b.png"], "conversations": turns("first <image> or\n<image>", "second")},
        {"id": 3, "conversations": turns("say <image>", "ok")},
    ]
    one, two, text = LLaVA(dump(root / "chat.json", records))
    assert one.messages[0]["content"] == [{"type": "image", "media": 0}, {"type": "text", "text": "what?"}]
    assert one.messages[1]["content"] == "a <image> cat"  # what the assistant says is text
    assert [message["role"] for message in one.messages] == ["user", "assistant"] * 2
    assert parts(two) == ["first ", 0, " or", 1]
    assert text.messages[0]["content"] == "say <image>"
    assert text.media == []
    assert one.meta == {"id": "x"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": 5}, "record 0: key 'conversations' is missing"),
        ({"id": 5, "conversations": []}, "record 0: key 'conversations' is empty"),
        ({"id": 5, "conversations": [{"from": "human"}]}, r"\(id 5\): key 'value' is missing"),
        ({"id": 5, "conversations": [{"from": "bot", "value": ""}]}, r"\(id 5\): key 'from': .*'bot'"),
        ({"id": 5, "image": "a.png", "conversations": turns("hi", "ho")}, "1 images but 0 '<image>'"),
        ({"id": 5, "image": "a.png", "conversations": turns("<image><image>")}, "1 images but 2"),
        ({"id": 5, "image": "gone.png", "conversations": turns("<image>")}, r"\(id 5\): key 'image': no file"),
        ({"id": 5, "image": "../secret.png", "conversations": turns("<image>")}, "lies outside"),
        (5, "record 0: expected an object"),
    ],
)
def test_llava_names_the_record(root, record, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(LLaVA(dump(root / "chat.json", [record])))
    assert str(caught.value).startswith(f"{root}/chat.json: record 0")


def test_llava_names_the_file(root):
    (root / "chat.json").write_text('[\n{"id": 1,\n}]')
    with pytest.raises(ValueError, match=r"chat\.json: line 3: not JSON"):
        list(LLaVA(root / "chat.json"))
    with pytest.raises(ValueError, match="expected a list of records, got dict"):
        list(LLaVA(dump(root / "chat.json", {})))
    with pytest.raises(ValueError, match="no folder of images"):
        LLaVA(root / "chat.json", images=root / "nowhere")
    with pytest.raises(ValueError, match="no such file"):
        list(LLaVA(root / "gone.json"))
