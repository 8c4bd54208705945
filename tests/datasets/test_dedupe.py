"""Duplicates and evaluation data: what goes, what stays, and that nothing depends on how the work is cut."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mm.datasets.decontaminate import Decontaminate
from mm.datasets.dedupe import Dedupe, _rows
from mm.datasets.engines import run_ordered
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import write_shards
from mm.datasets.similarity import distances, image_hash, ngram_hashes, text_signature, words
from mm.datasets.source import Source
from mm.datasets.steps import Removed
from mm.types import Media, Sample

pytest.importorskip("imagehash")
pytest.importorskip("datasketch")

STORY = (
    "the lighthouse keeper climbed the narrow stairs every evening to light the lamp and watch the ships that passed "
    "between the rocks and the open sea while the gulls cried above the waves and the wind pulled at the old windows"
)


def picture(seed: int, size: int = 96, name: str = "a.png", **options) -> Media:
    """A drawing of some shapes that `seed` chooses."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (400, 400), tuple(int(level) for level in draw.integers(0, 256, 3)))
    for _ in range(8):
        x, y, w, h = draw.integers(0, 300, 4)
        color = tuple(int(level) for level in draw.integers(0, 256, 3))
        ImageDraw.Draw(image).ellipse((x, y, x + w + 20, y + h + 20), fill=color)
    file = io.BytesIO()
    image.resize((size, size)).save(file, "JPEG" if name.endswith("jpg") else "PNG", **options)
    return Media("image", file.getvalue(), name)


def blank(level: int, size: int = 64) -> Media:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (level, level, level)).save(file, "PNG")
    return Media("image", file.getvalue(), "blank.png")


def said(key: str, text: str, *media: Media) -> Sample:
    parts = [{"role": "user", "content": [{"type": "image", "media": i} for i in range(len(media))]}] if media else []
    return Sample(key, [*parts, {"role": "assistant", "content": text}], list(media))


class Listed(Source[int]):
    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = list(samples)

    def records(self) -> Iterable[int]:
        return range(len(self.samples))

    def sample(self, record: int) -> Sample:
        return self.samples[record]


def kept(tmp_path, samples, dedupe, **options):
    manifest = write_shards(Listed(samples), tmp_path, samples_per_shard=3, dedupe=dedupe, **options)
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert sum(manifest["removed"].values()) == len(removed)
    return [sample.key for sample in ShardDataset(tmp_path)], {note["key"]: note for note in removed}


def test_exact_duplicates_go_and_the_first_stays(tmp_path):
    a, b = picture(1), picture(2)
    samples = [said("a", "one", a), said("b", "one", b), said("c", "one", a), said("d", "two", a), said("e", "one", b)]
    keys, removed = kept(tmp_path, samples, Dedupe(("exact",)))
    assert keys == ["a", "b", "d"]
    assert removed["c"]["reason"] == "duplicate"
    assert (removed["c"]["detail"], removed["e"]["detail"]) == ("same as a", "same as b")
    assert removed["e"]["record"] == 4


def test_images_seen_before_go_whatever_their_size_and_encoding(tmp_path):
    samples = [
        said("a", "one", picture(1)),
        said("smaller", "other words", picture(1, 48)),
        said("jpeg", "three", picture(1, 96, "a.jpg", quality=70)),
        said("other", "four", picture(2)),
        said("both", "five", picture(2, 60), picture(1, 60)),
        said("one new", "six".replace(" ", ""), picture(1), picture(3)),
        said("white", "page", blank(255)),
        said("grey", "page", blank(200)),
        said("white again", "page", blank(255)),
        said("text", "no image"),
    ]
    samples = [Sample(s.key.replace(" ", "_"), s.messages, s.media) for s in samples]
    keys, removed = kept(tmp_path, samples, Dedupe(("images",)))
    assert keys == ["a", "other", "one_new", "white", "grey", "text"]
    assert removed["both"]["detail"] == "in other, a"
    assert removed["white_again"]["detail"] == "in white"


def test_nearly_the_same_text_goes(tmp_path):
    other = " ".join(reversed(STORY.split()))
    samples = [
        said("a", STORY),
        said("same", STORY.upper().replace(" ", "  ") + "!"),
        said("near", STORY.replace("evening", "night")),
        said("other", other),
        said("half", " ".join(STORY.split()[:16])),
        said("short", "hello there"),
        said("short2", "hello there"),
        said("image", STORY, picture(1)),
    ]
    keys, removed = kept(tmp_path, samples, Dedupe(("text",), similarity=0.7))
    assert keys == ["a", "other", "half", "short", "short2", "image"]  # with media, text alone makes no duplicate
    assert removed["same"]["detail"] == "1.00 like a"
    assert removed["near"]["reason"] == "near-duplicate text"


def test_the_result_does_not_depend_on_workers_or_interruptions(tmp_path):
    samples = [said(f"s{n}", f"text {n % 7}", picture(n % 5)) for n in range(20)]
    dedupe = Dedupe(("exact", "images"))
    write_shards(Listed(samples), tmp_path / "one", samples_per_shard=3, dedupe=dedupe)
    broken = list(samples)
    broken[13] = said("s13", "broken", Media("image", b"not an image", "x.png"))
    with pytest.raises(ValueError, match="x.png"):
        write_shards(Listed(broken), tmp_path / "two", samples_per_shard=3, dedupe=dedupe)
    write_shards(Listed(samples), tmp_path / "two", samples_per_shard=3, dedupe=dedupe)
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


def test_pieces_that_steps_leave_small_become_whole_shards(tmp_path):
    samples = [said(f"s{n}", f"text {n % 30}") for n in range(60)]
    manifest = write_shards(Listed(samples), tmp_path, samples_per_shard=7, dedupe=Dedupe(("exact",)))
    assert [shard["samples"] for shard in manifest["shards"]] == [7, 7, 7, 7, 2]
    assert [sample.key for sample in ShardDataset(tmp_path)] == [f"s{n}" for n in range(30)]
    ShardDataset(tmp_path).verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("same",)}, "--dedupe 'same': expected one or several of exact, images, text"),
        ({"distance": 16}, "--image-distance 16"),
        ({"similarity": 0.1}, "--text-similarity 0.1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Dedupe(**options)


def test_perceptual_hashes_and_shingles():
    near, far = image_hash(picture(1, 50)), image_hash(picture(2))
    base = image_hash(picture(1))
    assert base is not None and near is not None and far is not None
    assert distances(base, np.array([near, far], np.uint64))[0] <= 3 < distances(base, np.array([far], np.uint64))[0]
    assert image_hash(blank(3)) is None
    assert words("Don't  stop: ＡＢＣ 日本語") == ["don", "t", "stop", "abc", "日", "本", "語"]
    assert len(ngram_hashes(["a", "b", "c"], 2)) == 2
    assert len(ngram_hashes(["a"], 2)) == 0
    assert ngram_hashes(["a", "b"], 2) != ngram_hashes(["b", "a"], 2)
    assert text_signature("too short") is None
    rows = _rows(0.8)
    assert 1 - (1 - 0.8**rows) ** (128 // rows) >= 0.98 > 1 - (1 - 0.8 ** (rows + 1)) ** (128 // (rows + 1))


QUESTION = "which of the two ships in the harbour has the taller mast and the darker sail"  # 15 words


@pytest.fixture
def held_out(tmp_path):
    """Shards of an evaluation set: a question with an image, a short question, and a template in many samples."""
    samples = [said("q0", QUESTION, picture(11)), said("q1", "what is the name of this very old bird")]
    samples += [
        said(f"t{n}", f"answer {n}\nplease answer with a single word or phrase only thank you") for n in range(12)
    ]
    write_shards(samples, tmp_path / "eval")
    return str(tmp_path / "eval")


def test_evaluation_questions_and_images_are_found(tmp_path, held_out):
    step = Decontaminate((held_out,)).prepare(tmp_path)
    for text, detail in (
        (
            "he asked: Which of the two ships in the harbour has the taller mast -- and why?",
            "eval q0: which of the two",
        ),
        ("What is the name of this VERY old bird?", "eval q1: what is the name of this very old bird"),
    ):
        with pytest.raises(Removed, match=f"evaluation text: {detail}"):
            step(said("x", text))
    for image, detail in (
        (picture(11), "eval q0: the same image"),
        (picture(11, 70, "a.jpg"), "an image like 'a.jpg'"),
    ):
        with pytest.raises(Removed, match=detail):
            step(said("x", "hello", image))
    for clean in (
        said("x", "which of the two ships in the port has the taller mast and the darker sail", picture(12)),
        said("x", "please answer with a single word or phrase only thank you"),  # a template
        said("x", "what is the name of this bird"),
    ):
        assert step(clean) is clean


def test_decontamination_is_reported_and_repeats(tmp_path, held_out):
    samples = [said("a", QUESTION), said("b", STORY), said("c", "hello", picture(11))]
    step = Decontaminate((held_out,))
    manifest = write_shards(Listed(samples), tmp_path / "out", steps=[step])
    assert manifest["removed"] == {"evaluation text": 1, "evaluation media": 1}
    assert list(manifest["settings"]["steps"][0]["decontaminate"]["sets"]) == [held_out]
    assert [sample.key for sample in ShardDataset(tmp_path / "out")] == ["b"]
    with pytest.raises(ValueError, match="steps keep .*evaluation text"):
        write_shards(Listed(samples[:1]), tmp_path / "none", steps=[step])
    with pytest.raises(ValueError, match="by 5 words: expected 8 or more"):
        Decontaminate((held_out,), words=5)
    with pytest.raises(ValueError, match="nowhere"):
        Decontaminate(("nowhere",)).describe()


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path):
    pytest.importorskip("ray")
    from mm.datasets.sources.world_audio import AudioWorld

    write_shards(AudioWorld(6), tmp_path / "local", samples_per_shard=2)
    write_shards(AudioWorld(6), tmp_path / "ray", samples_per_shard=2, workers=2, engine="ray")
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert local == {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()}
    with pytest.raises(ValueError, match="of 1 records are bad"):
        write_shards(Listed([said("a.b", "x")]), tmp_path / "bad", engine="ray")


def test_results_come_in_order_and_a_dead_worker_is_named():
    assert list(run_ordered(pow, [(n, 2) for n in range(5)], workers=1)) == [0, 1, 4, 9, 16]
    import os

    with pytest.raises(ChildProcessError, match="worker process died.*run the same command again"):
        list(run_ordered(os._exit, [(1,)], workers=2))
