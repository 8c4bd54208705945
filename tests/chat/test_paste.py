import pytest

from mm.chat.paste import media_in


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name in ("cat.png", "two words.PNG", "it's.wav", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "text", "files"),
    [
        ("cat.png", "", [("image", "cat.png")]),
        ("  cat.png ", "", [("image", "cat.png")]),
        ("two words.PNG", "", [("image", "two words.PNG")]),
        ("'two words.PNG' what is it?", "what is it?", [("image", "two words.PNG")]),
        (r"two\ words.PNG what is it?", "what is it?", [("image", "two words.PNG")]),
        ('compare cat.png "two words.PNG"', "compare", [("image", "cat.png"), ("image", "two words.PNG")]),
        ("\"it's.wav\" what's that?", "what's that?", [("audio", "it's.wav")]),
        ("what's in cat.jpg?", "what's in cat.jpg?", []),
        ("gone.png", "gone.png", []),
        ("read notes.txt", "read notes.txt", []),
        ("it's  a 'quoted   text'", "it's  a 'quoted   text'", []),
        ("a\\", "a\\", []),
        ("", "", []),
    ],
)
def test_media_in(line, text, files):
    assert media_in(line) == (text, files)


def test_absolute_paths_and_addresses(folder):
    path = folder / "two words.PNG"
    assert media_in(f"file://{folder}/two%20words.PNG") == ("", [("image", str(path))])
    assert media_in(f"{folder}/cat.png colour?") == ("colour?", [("image", f"{folder}/cat.png")])
    assert media_in("file:///gone.png") == ("file:///gone.png", [])


def test_odd_lines_are_text():
    for line in ("\0.png", "x" * 10_000 + ".png", "~/.png", "<image>", "/help"):
        assert media_in(line) == (line, [])
