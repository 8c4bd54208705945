"""Generated worlds: what a clip says it shows can be measured in it, and questions alone give nothing away."""

import io
import wave
from collections import Counter, defaultdict

import av
import numpy as np
import pytest

from mm.datasets.sources.world_audio import RATE, AudioWorld
from mm.datasets.sources.world_video import COLORS, MOVES, VideoWorld
from mm.datasets.worlds import encode_mp4, encode_wav


class Silent(AudioWorld):
    """Questions without the work of a clip."""

    def render(self, values, rng):
        return b""


class Blind(VideoWorld):
    def render(self, values, rng):
        return b""


WORLDS = pytest.mark.parametrize("world", [AudioWorld, VideoWorld])
QUESTIONS = pytest.mark.parametrize("world", [Silent, Blind])


def heard(sample):
    with wave.open(io.BytesIO(sample.media[0].data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


def seen(data):
    with av.open(io.BytesIO(data), "r") as file:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    times, images = zip(*frames, strict=True)
    return list(times), np.stack(images)


@WORLDS
def test_a_clip_depends_on_seed_split_and_index_alone(world):
    first = list(world(4, seed=5))
    assert first == list(world(4, seed=5))
    assert world(100, seed=5)[3] == first[3]  # not on the number of clips, nor on what was read before
    for other in (world(4, seed=6), world(4, "test", seed=5), world(4, "validation", seed=5)):
        assert not {s.media[0].data for s in first} & {s.media[0].data for s in other}


@WORLDS
def test_single_questions_are_the_branches(world):
    whole, single = world(2, seed=1), world(2, seed=1, branches=False)
    asked = world.asked + 1
    assert (len(whole), len(single)) == (2, 2 * asked)
    assert [sample.key for sample in single] == [single[index].key for index in range(len(single))]
    for index, sample in enumerate(single):
        clip = whole[index // asked]
        question, answer = clip.branches[index % asked]
        assert sample.media == clip.media
        assert sample.messages[0]["content"] == [
            {"type": world.kind, "media": 0},
            {"type": "text", "text": question["content"]},
        ]
        assert sample.messages[1] == answer
        assert sample.meta["answers"] == [answer["content"]]
        assert sample.meta["category"] == clip.meta["question_types"][index % asked]
        assert sample.meta["generated"] is True


@QUESTIONS
def test_a_reader_of_the_questions_alone_is_at_chance(world):
    """The best possible such reader: for each question its most frequent answer in the training split."""
    answers = defaultdict(Counter)
    for sample in world(3000):
        for question, answer in sample.branches:
            answers[question["content"]][answer["content"]] += 1
    right, total, chance = Counter(), Counter(), {"yes/no": 1 / 2}
    chance |= {attribute.name: 1 / len(attribute.values) for attribute in world.attributes}
    for sample in world(2000, "test"):
        for kind, (question, answer) in zip(sample.meta["question_types"], sample.branches, strict=True):
            total[kind] += 1
            right[kind] += answers[question["content"]].most_common(1)[0][0] == answer["content"]
    assert set(total) == set(chance)
    assert total["yes/no"] <= 0.2 * total.total()
    for kind, share in chance.items():
        deviation = (share * (1 - share) / total[kind]) ** 0.5
        assert right[kind] / total[kind] < share + 5 * deviation, kind


@QUESTIONS
def test_attributes_are_independent(world):
    """What is true of one attribute says nothing of another."""
    samples = list(world(3000))
    names = [attribute.name for attribute in world.attributes]
    for one in names:
        for other in names:
            if one < other:
                table = Counter((s.meta["attributes"][one], s.meta["attributes"][other]) for s in samples)
                expected = len(samples) / len(table)
                assert all(abs(count - expected) < 6 * expected**0.5 for count in table.values()), (one, other)


@QUESTIONS
def test_answers_are_single_words_of_a_small_vocabulary(world):
    said = {answer["content"] for sample in world(500) for _, answer in sample.branches}
    assert said == {value for attribute in world.attributes for value in attribute.values} | {"yes", "no"}
    assert all(word.isalpha() for word in said)


def test_a_sound_has_what_it_says():
    for sample in AudioWorld(40, seed=2):
        values = sample.meta["attributes"]
        sound = heard(sample)
        assert len(sound) == 1.6 * RATE
        level = np.sqrt(np.convolve(sound**2, np.ones(160) / 160, "same"))
        loud = level > 5e-3
        assert ("one", "two", "three", "four")[np.count_nonzero(np.diff(loud.astype(int)) == 1) - 1] == values["count"]
        places = np.flatnonzero(loud)
        first, last = places[0] + 200, places[-1] - 200 - 1024
        hertz = [np.abs(np.fft.rfft(sound[at : at + 1024])).argmax() * RATE / 1024 for at in (first, last)]
        octaves = np.log2(hertz[1] / hertz[0])
        assert {1: "rising", -1: "falling", 0: "steady"}[int(np.sign(octaves) * (abs(octaves) > 0.3))] == values[
            "pitch"
        ]
        assert ("high" if np.sqrt(hertz[0] * hertz[1]) > 800 else "low") == values["register"]
        decibels = 20 * np.log10(level[last] / level[first])
        assert {1: "louder", -1: "softer", 0: "even"}[int(np.sign(decibels) * (abs(decibels) > 6))] == values["volume"]


def test_a_video_shows_what_it_says():
    for sample in VideoWorld(30, seed=3):
        values = sample.meta["attributes"]
        times, frames = seen(sample.media[0].data)
        assert times == [index / 4 for index in range(16)]  # exactly
        assert frames.shape == (16, 48, 48, 3)
        away = np.abs(frames.astype(int) - frames[:, :1, :1]).sum(-1) > 120
        centres = np.array([np.argwhere(mask).mean(0) for mask in away])
        moved = centres[-1] - centres[0]
        assert np.allclose(moved / 28, MOVES[values["direction"]], atol=0.1)  # 28 px, most of the frame
        for frame, mask, name in ((0, away[0], "first color"), (7, away[7], "first color"), (8, away[8], "last color")):
            middle = np.median(frames[frame][mask], axis=0)
            nearest = min(COLORS, key=lambda color: np.abs(middle - COLORS[color]).sum())
            assert nearest == values[name]
        height, width = np.ptp(np.argwhere(away[3]), axis=0) + 1
        filled = away[3].sum() / (height * width)  # 1, pi / 4 or 1 / 2, blurred by the codec
        assert ("triangle" if filled < 0.66 else "circle" if filled < 0.9 else "rectangle") == values["shape"]


def test_wav_clips_instead_of_wrapping():
    with wave.open(io.BytesIO(encode_wav(np.array([0.0, 2.0, -2.0, 0.5]), 8000))) as file:
        assert np.frombuffer(file.readframes(4), "<i2").tolist() == [0, 32767, -32767, 16384]


def test_mp4_keeps_frames_in_their_order():
    grays = np.arange(10, dtype=np.uint8) * 25
    times, frames = seen(encode_mp4(np.broadcast_to(grays[:, None, None, None], (10, 16, 32, 3)).copy(), 8))
    assert times == [index / 8 for index in range(10)]
    assert np.abs(frames.mean((1, 2, 3)) - grays).max() < 3  # H.264 at crf 10


@pytest.mark.parametrize(
    ("options", "word"), [({"n": -1}, "n must be"), ({"n": 1, "split": "dev"}, "'dev'"), ({"n": 1, "seed": -1}, "seed")]
)
def test_bad_options(options, word):
    with pytest.raises(ValueError, match=word):
        AudioWorld(**options)


def test_outside():
    with pytest.raises(IndexError, match="index 3 of 3"):
        VideoWorld(3)[3]


@QUESTIONS
def test_a_caption_tells_every_attribute(world):
    captions = list(world(n=5, captions=True))
    assert len(captions) == 5 == len(world(n=5, captions=True))
    for index, sample in enumerate(captions):
        told = sample.messages[1]["content"]
        values = world(n=5)[index].meta["attributes"]  # the same clip, asked about
        assert told == ", ".join(f"{name} {value}" for name, value in values.items())
        assert sample.messages[0]["content"] == [{"type": world.kind, "media": 0}] and not sample.branches


def test_a_clip_made_again_has_the_same_bytes() -> None:
    world = VideoWorld(1)
    assert len({world[0].media[0].data for _ in range(300)}) == 1
