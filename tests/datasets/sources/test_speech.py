"""LibriSpeech, Common Voice, WebVid and class folders."""

import pytest

from mm.datasets.catalog import open_source
from mm.datasets.sources.class_folder import ClassFolder
from mm.datasets.sources.common_voice import CommonVoice
from mm.datasets.sources.librispeech import LibriSpeech
from mm.datasets.sources.webvid import WebVid


def put(path, data=b"data"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def libri(root):
    put(root / "test-clean/84/121/84-121.trans.txt", b"84-121-0000 GO ON\n84-121-0001 DO YOU HEAR\n")
    put(root / "test-clean/84/121/84-121-0000.flac")
    put(root / "test-clean/84/121/84-121-0001.wav")
    return root


def test_librispeech(root):
    libri(root)
    for path, options in ((root, {}), (root, {"split": "test-clean"}), (root / "test-clean/84/121", {})):
        source = open_source(f"librispeech:{path}", **options) if options else open_source(str(path))
        assert isinstance(source, LibriSpeech)
        first, second = source
        assert first.key == "librispeech_84-121-0000"
        assert [message["content"] for message in first.messages] == [[{"type": "audio", "media": 0}], "go on"]
        assert first.meta["speaker"] == "84" and first.meta["chapter"] == "121"
        assert second.media[0].name == "84-121-0001.wav"
    [first, _] = LibriSpeech(root, prompt="transcribe", lower=False)
    assert first.messages[0]["content"][1]["text"] == "transcribe"
    assert first.messages[1]["content"] == "GO ON"


def test_librispeech_bad_input(root):
    with pytest.raises(ValueError, match=r"no \*\.trans\.txt"):
        LibriSpeech(root)
    libri(root)
    (root / "test-clean/84/121/84-121-0001.wav").unlink()
    with pytest.raises(ValueError, match=r"84-121\.trans\.txt: line 2: no file .*84-121-0001\.flac"):
        list(LibriSpeech(root))
    put(root / "test-clean/84/121/84-121.trans.txt", b"84-121-0000\n")
    with pytest.raises(ValueError, match="line 1: expected ID TEXT"):
        list(LibriSpeech(root))
    with pytest.raises(ValueError, match="dev-clean: no such folder"):
        LibriSpeech(root, split="dev-clean")


HEADER = b"client_id\tpath\tsentence\tup_votes\tlocale\n"


def test_common_voice(root):
    put(root / "de/clips/common_voice_de_1.mp3")
    put(root / "de/test.tsv", HEADER + b'c1\tcommon_voice_de_1.mp3\tEr sagte "nein.\t2\tde\n')
    source = open_source(str(root / "de"), split="test")
    assert isinstance(source, CommonVoice)
    [sample] = source
    assert sample.messages[1]["content"] == 'Er sagte "nein.'
    assert (sample.meta["language"], sample.meta["client_id"]) == ("de", "c1")
    assert sample.meta["answers"] == ['Er sagte "nein.']
    assert sample.media[0].kind == "audio"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"path\tother\n", "line 1: column 'sentence' is missing"),
        (HEADER + b"c\ta.mp3\n", "line 2: expected as many cells"),
        (HEADER + b"c\tgone.mp3\tx\t1\tde\n", "line 2: column 'path': no file"),
        (HEADER + b"c\tgone.mp3\t \t1\tde\n", "line 2: column 'sentence' is empty"),
        (HEADER + b"c\t\xff\n", "line 1: not UTF-8"),
    ],
)
def test_common_voice_bad_input(root, rows, message):
    put(root / "clips/a.mp3")
    put(root / "train.tsv", rows)
    with pytest.raises(ValueError, match=message):
        list(CommonVoice(root))
    with pytest.raises(ValueError, match="dev.tsv: no such file"):
        CommonVoice(root, split="dev")


def test_webvid(root):
    put(root / "videos/000/17.webm")
    put(root / "videos/18.mp4")
    put(
        root / "w.csv",
        b'videoid,contentUrl,duration,page_dir,name\n17,u,PT5S,000,"A dog, running"\n18,,,,Sea\n19,,,,Gone\n',
    )
    with pytest.raises(ValueError, match=r"w\.csv: line 4: column 'videoid': no file .*19\.mp4"):
        list(WebVid(root / "w.csv"))
    source = open_source(str(root / "w.csv"), missing="skip", prompt="describe")
    assert isinstance(source, WebVid)
    dog, sea = source
    assert dog.messages[1]["content"] == "A dog, running"
    assert dog.media[0].kind == "video" and dog.media[0].name == "000/17.webm"
    assert dog.meta == {"id": "17", "captions": ["A dog, running"], "contentUrl": "u", "duration": "PT5S"}
    assert sea.media[0].name == "18.mp4"
    put(root / "w.csv", b"videoid,caption\n")
    with pytest.raises(ValueError, match="column 'name' is missing"):
        list(WebVid(root / "w.csv"))
    with pytest.raises(ValueError, match="no such folder; set videos=DIR"):
        WebVid(root / "w.csv", videos=root / "nowhere")


def test_class_folders(root):
    for name in ("train/hot_dog/1.png", "train/hot_dog/x/2.jpg", "train/cat/3.png", "test/cat/4.png"):
        put(root / "c" / name)
    put(root / "c/train/cat/readme.txt")
    samples = list(ClassFolder(root / "c", split="train", prompt="what is it?"))
    assert [sample.messages[1]["content"] for sample in samples] == ["cat", "hot dog", "hot dog"]
    assert samples[0].messages[0]["content"][1]["text"] == "what is it?"
    assert [sample.meta["id"] for sample in samples] == ["cat/3.png", "hot_dog/1.png", "hot_dog/x/2.jpg"]
    assert isinstance(open_source(str(root / "c/train")), ClassFolder)
    assert next(iter(ClassFolder(root / "c/train", spaces=False))).meta["category"] == "cat"
    with pytest.raises(ValueError, match="no media in folders named after classes"):
        list(ClassFolder(root / "c/test/cat"))
    with pytest.raises(ValueError, match="dev: no such folder"):
        ClassFolder(root / "c", split="dev")
