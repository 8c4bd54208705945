"""Emoji drawings and their names."""

import io

import pytest
from PIL import Image

from mm.datasets.sources.openmoji import OpenMoji


def picture(sample):
    """The first medium, opened."""
    return Image.open(io.BytesIO(sample.media[0].data))


def test_openmoji_splits_by_emoji():
    train, test = list(OpenMoji().records()), list(OpenMoji("test").records())
    assert len(train) + len(test) == 1914
    assert not set(train) & set(test)
    assert len(test) == pytest.approx(0.2 * 1914, abs=60)
    assert not any(0x1F3FB <= ord(character) <= 0x1F3FF for text in train + test for character in text)
    assert list(OpenMoji("test", held_out=0.0).records()) == []


def test_openmoji_samples():
    source = OpenMoji(size=32)
    sample = source.sample("😀")
    assert sample.messages[1] == {"role": "assistant", "content": "grinning face"}
    image = picture(sample).convert("RGBA")
    assert image.size == (32, 32)
    assert image.getpixel((0, 0)) == (255, 255, 255, 255)  # over white
    assert len(image.getcolors(1024) or []) > 5
    assert source.sample("🇫🇷").messages[1]["content"] == "flag: France"
    assert source.sample("🏴󠁧󠁢󠁳󠁣󠁴󠁿").messages[1]["content"] == "flag: Scotland"
    assert source.sample("🏴").messages[1]["content"] == "black flag"
    for options in ({"size": 0}, {"held_out": 1.5}, {"split": "dev"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            OpenMoji(**options)  # type: ignore[arg-type]
