"""A folder of media with a metadata file."""

import json

import pytest

from mm.datasets.sources.folder import Folder


def parts(sample, index=0):
    return [part.get("text", part.get("media")) for part in sample.messages[index]["content"]]


def test_folder_of_every_form(root):
    (root / "c.wav").write_bytes(b"RIFF")
    chat = [{"role": "user", "content": [{"type": "image", "media": 1}, {"type": "text", "text": "?"}]}]
    chat += [{"role": "user", "content": [{"type": "image", "media": 0}]}, {"role": "assistant", "content": "<image>"}]
    rows = [
        {"file_name": "a.png", "text": "a cat"},
        {"image": ["images/1.png", "images/2.png"], "audio": "c.wav", "question": "which?", "answer": "both", "id": 7},
        {"image": "b.png", "question": "why?", "split": "test"},
        {"text": "only text"},
        {"image": ["a.png", "b.png"], "messages": chat},
    ]
    (root / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    caption, question, asked, text, talk = Folder(root)
    assert caption.messages == [
        {"role": "user", "content": [{"type": "image", "media": 0}]},
        {"role": "assistant", "content": "a cat"},
    ]
    assert parts(question) == [0, 1, 2, "which?"]
    assert [item.kind for item in question.media] == ["image", "image", "audio"]
    assert question.messages[1]["content"] == "both"
    assert question.meta == {"id": 7, "answers": ["both"], "question": "which?"}
    assert [message["role"] for message in asked.messages] == ["user"]
    assert text.messages == [{"role": "assistant", "content": "only text"}]
    assert talk.messages == chat
    rows = [{"text": "x", "split": "test"}, {"text": "y", "split": "train"}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [sample.key for sample in Folder(root, split="train")] == ["train_00000001"]


def test_folder_csv(root):
    (root / "metadata.csv").write_text('file_name,question,answer,size\na.png,"what, is it?",a cat,\nb.png,who?,,4\n')
    one, two = Folder(root, keep=("size",))
    assert parts(one) == [0, "what, is it?"]
    assert (one.meta, two.meta) == (
        {"question": "what, is it?", "answers": ["a cat"]},
        {"question": "who?", "size": "4"},
    )
    (root / "metadata.csv").write_text('text\n"open\n')
    with pytest.raises(ValueError, match=r"metadata\.csv: line \d: not CSV \(unexpected end"):
        list(Folder(root))
    (root / "metadata.csv").write_text("text,id\nx,1\ny\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: line 3: expected 2 cells"):
        list(Folder(root))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"text": "a", "colour": 1}', "line 2: unknown column 'colour'.*set keep=colour"),
        ('{"file_name": "gone.png", "text": "a"}', "line 2: key 'file_name': no file .*gone.png"),
        ('{"file_name": "../secret.png", "text": "a"}', "line 2: key 'file_name': '../secret.png' lies outside"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "line 2: key 'file_name': '/etc/passwd' lies outside"),
        ('{"file_name": "link.png", "text": "a"}', "line 2: key 'file_name': 'link.png' lies outside"),
        ('{"file_name": "metadata.jsonl", "text": "a"}', "line 2: key 'file_name': .* no known image"),
        ('{"file_name": 3, "text": "a"}', "line 2: key 'file_name': expected a file name, got 3"),
        ('{"audio": "a.png", "text": "a"}', "line 2: key 'audio': 'a.png' is image, expected audio"),
        ('{"file_name": "a.png"}', "line 2: expected one of 'text'.*found none"),
        ('{"text": "a", "question": "b"}', "line 2: expected one of .* found text and question"),
        ('{"text": 5}', "line 2: key 'text': expected text, got 5"),
        ('{"text": "a", "answer": "b"}', "line 2: key 'answer' without 'question'"),
        ('{"messages": []}', "line 2: key 'messages': expected a list of messages"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "line 2: key 'messages': message 0: expected a role"),
        ('{"messages": [{"role": "user", "content": [4]}]}', "line 2: key 'messages': message 0: expected text, or"),
        ('{"image": "a.png", "messages": [{"role": "user", "content": "a"}]}', "the row has 1; name each once"),
        ("\udcff", "line 2: not UTF-8"),
    ],
)
def test_folder_names_file_line_and_key(root, line, message):
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "metadata.jsonl").write_bytes(b'{"text": "fine"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        list(Folder(root))
    assert str(caught.value).startswith(f"{root}/metadata.jsonl: line 2")
    assert "\n" not in str(caught.value)


def test_folder_without_metadata(root):
    with pytest.raises(ValueError, match=r"metadata\.jsonl and metadata\.csv"):
        Folder(root)
    (root / "metadata.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="key 'split' is missing"):
        list(Folder(root, split="test"))
