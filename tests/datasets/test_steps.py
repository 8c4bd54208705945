"""What `mm shard` leaves out and changes, each step alone."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from mm.datasets.decode import decode, probe
from mm.datasets.steps import Filter, Part, Removed, from_options
from mm.datasets.transforms import Transform
from mm.datasets.worlds import encode_mp4, encode_wav
from mm.types import Media, Sample, Waveform


def image(width: int, height: int, name: str = "a.png", **options: Any) -> Media:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(name[-3:], name[-3:].upper()), **options)
    return Media("image", file.getvalue(), name)


def content(item: Media) -> io.BytesIO:
    assert isinstance(item.data, bytes)
    return io.BytesIO(item.data)


def sound(seconds: float, rate: int = 8000, name: str = "a.wav") -> Media:
    return Media("audio", encode_wav(np.sin(np.arange(round(seconds * rate)) / rate * 2 * np.pi * 440), rate), name)


def clip(seconds: float = 2, fps: int = 4) -> Media:
    frames = np.zeros((round(seconds * fps), 32, 48, 3), np.uint8)
    frames[:] = (np.arange(len(frames)) * 20)[:, None, None, None]
    return Media("video", encode_mp4(frames, fps), "a.mp4")


def sample(*media: Media, text: str = "one two three", **meta: Any) -> Sample:
    return Sample("k", [{"role": "assistant", "content": text}], list(media), meta=meta)


@pytest.mark.parametrize(
    ("options", "given", "reason"),
    [
        ({"min_side": 20}, sample(image(30, 19)), "shorter side: 19 is less than 20"),
        ({"max_side": 29}, sample(image(30, 19)), "longer side: 30 is more than 29"),
        ({"max_aspect": 1.5}, sample(image(30, 19)), "aspect: 1.57895 is more than 1.5"),
        ({"min_side": 40}, sample(clip()), "shorter side: 32"),
        ({"min_seconds": 1.0}, sample(sound(0.5)), "seconds: 0.5 is less than 1"),
        ({"max_seconds": 1.0}, sample(clip(2)), "seconds: 2 is more than 1"),
        ({"min_words": 4}, sample(), "words: 3 is less than 4"),
        ({"max_words": 2}, sample(), "words: 3 is more than 2"),
        ({"max_bytes": 100}, sample(sound(0.5)), "bytes: 8044 is more than 100"),
        ({"language": ("en",)}, sample(), "language: unknown"),
        ({"language": ("en",)}, sample(language="de"), "language: de"),
        ({"language": ("en",)}, sample(lang="eng"), "language: eng"),
    ],
)
def test_filters_remove_and_say_why(options, given, reason):
    with pytest.raises(Removed, match=reason):
        Filter(**options)(given)


def test_filters_keep_what_fits():
    limits = Filter(20, 100, 2.0, 0.1, 10.0, 1, 10, 100_000, ("en", "de"))
    for kept in (sample(image(30, 20), lang="EN_gb"), sample(sound(1), language="de"), sample(clip(), locale="de-AT")):
        assert limits(kept) is kept
    assert limits.describe()["filter"]["language"] == ["en", "de"]
    assert Filter(min_words=2).describe() == {"filter": {"min_words": 2}}


def test_parts_share_no_id_and_cover_all():
    parts = [Part(0, 0.5), Part(0.5, 0.9), Part(0.9, 1)]
    counts = [0, 0, 0]
    for number in range(2000):
        keeps = []
        for index, part in enumerate(parts):
            try:
                part(Sample(f"s{number}", []))
                keeps.append(index)
            except Removed as removed:
                assert removed.reason == "other part"
        assert len(keeps) == 1
        counts[keeps[0]] += 1
    assert [round(count / 2000, 1) for count in counts] == [0.5, 0.4, 0.1]
    assert [round(count, -2) for count in counts] == [1000, 800, 200]


def test_a_part_by_image_keeps_an_images_samples_together():
    part = Part(0, 0.5, by="image_id")
    for image_id in range(50):
        kept = set()
        for number in range(3):
            try:
                part(Sample(f"{image_id}_{number}", [], meta={"image_id": image_id}))
                kept.add(True)
            except Removed:
                kept.add(False)
        assert len(kept) == 1
    with pytest.raises(ValueError, match="--part-by image_id: its meta has no such key"):
        part(Sample("a", []))
    with pytest.raises(ValueError, match="--part 0.5:0.5: expected FROM:TO"):
        Part(0.5, 0.5)


def test_options_are_typed_and_named():
    assert from_options(Filter, [], "--filter") is None
    made = from_options(Filter, ["min_side=3", "max_aspect=2.5", "language=en,de"], "--filter")
    assert made == Filter(min_side=3, max_aspect=2.5, language=("en", "de"))
    for text, message in (
        ("min_side", "--filter 'min_side': write KEY=VALUE"),
        ("side=3", "no key 'side'; there are: min_side"),
        ("min_side=x", "--filter min_side: expected int.*'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_options(Filter, [text], "--filter")


@pytest.mark.parametrize(
    ("given", "options", "name", "size"),
    [
        (image(100, 50), {"image_side": 20}, "a.png", (20, 10)),
        (image(100, 50, "a.jpg"), {"image_side": 20}, "a.jpg", (20, 10)),
        (image(100, 50), {"image_format": "jpeg"}, "a.jpg", (100, 50)),
        (image(100, 50, "x/a.bmp"), {"image_side": 200}, "x/a.png", (100, 50)),
        (image(100, 1), {"image_side": 10, "image_format": "webp"}, "a.webp", (10, 1)),
    ],
)
def test_images_are_made_smaller_and_re_encoded(given, options, name, size):
    [made] = Transform(**options)(sample(given)).media
    assert made.name == name
    assert Image.open(content(made)).size == size
    assert Transform(**options)(sample(given)).media == [made]  # the same bytes again


def test_images_that_are_small_enough_keep_their_bytes():
    given = image(40, 30, "a.jpg")
    assert Transform(image_side=40, image_format="jpeg")(sample(given)).media == [given]
    assert Transform(audio_rate=100)(sample(given)).media == [given]
    turned = image(40, 30, "a.jpg", exif=_orientation(6))
    [made] = Transform(image_side=40)(sample(turned)).media
    assert Image.open(content(made)).size == (30, 40)  # as it is shown, not as it is stored


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("form", ["flac", "wav"])
def test_sounds_are_resampled(form):
    samples = np.stack([np.sin(np.arange(44_100) / 44_100 * 2 * np.pi * 440 + shift) * 0.5 for shift in (0, 0)], 1)
    file = io.BytesIO()
    soundfile.write(file, samples, 44_100, format="WAV")
    step = Transform(audio_rate=16_000, audio_mono=True, audio_format=form)
    [made] = step(sample(Media("audio", file.getvalue(), "s.wav"))).media
    assert made.name == f"s.{form}"
    heard = decode(made)
    assert isinstance(heard, Waveform)
    assert (heard.rate, heard.samples.shape[0]) == (16_000, 1)
    assert abs(heard.samples.shape[1] - 16_000) <= 32
    wanted = 0.5 * np.sin(np.arange(heard.samples.shape[1]) / 16_000 * 2 * np.pi * 440)
    middle = slice(1000, 15_000)
    assert np.abs(heard.samples[0].numpy()[middle] - wanted[middle]).max() < 0.01


def test_frames_are_extracted_at_their_times():
    step = Transform(video_fps=2, video_side=24)
    [made] = step(sample(clip(seconds=3, fps=4))).media
    assert made.name == "a.mkv"
    assert step(sample(clip(seconds=3, fps=4))).media == [made]  # Matroska's random ids are left out
    with decode(made) as seen:  # type: ignore[union-attr]
        assert seen.size == (16, 24)
        assert [round(time, 3) for time in seen.times] == [0, 0.5, 1, 1.5, 2, 2.5]  # type: ignore[union-attr]
        assert abs(seen.duration - 3) < 0.01
        levels = seen.frames_at([0, 0.5, 1.4, 2.5]).float().mean((1, 2, 3))
    assert [round(float(level) / 40) for level in levels] == [0, 1, 2, 5]
    with av.open(content(made), "r") as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_side": 0}, "image_side=0: expected more than 0"),
        ({"image_quality": 101}, "image_quality=101: expected 1 to 100"),
        ({"video_side": 10}, "video_side needs video_fps"),
    ],
)
def test_transforms_refuse_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Transform(**options)


def test_probing_reads_headers_only():
    assert probe(image(30, 20))[:2] == (30, 20)
    cut = image(300, 200)
    assert probe(replace(cut, data=cut.data[:200]))[:2] == (300, 200)  # type: ignore[index]
    assert probe(sound(0.5)).seconds == 0.5
    assert probe(clip(2)).seconds == 2
