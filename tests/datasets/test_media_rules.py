"""The written rules for media, one test a rule, with pixels and samples worked out by hand.

EXIF      the picture is turned as its orientation says, for all eight of them
CMYK      converted to RGB by (255 - C)(255 - K) / 255, without a colour profile
16 bits   grey levels are scaled, 65535 -> 255 (Pillow alone would clip); 32-bit and float pixels are refused
palette   looked up
alpha     blended over white, whether a channel, a palette entry or one transparent colour
animated  the first frame
1x1       a picture like any other
8000x8000 64 megapixels are read, one more is refused before it is decoded
8 channels  all are kept; tokenizers mix them
no samples  refused
variable frame rate  a frame is shown from its own time until the next one's
"""

from __future__ import annotations

import io
import resource
import struct
import warnings
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from torch import Tensor

from mm.datasets import video_clip
from mm.datasets.decode import MAX_PIXELS, decode
from mm.types import Media, MediaError, Waveform


def picture(image: Image.Image, form: str = "PNG", **options: Any) -> np.ndarray:
    """(H, W, 3) of the image written in a format and decoded by the rules."""
    file = io.BytesIO()
    image.save(file, form, **options)
    made = decode(Media("image", file.getvalue(), "a"))
    assert isinstance(made, Tensor)
    return made.permute(1, 2, 0).numpy()


# What each orientation stores so that it shows [[0, 1, 2], [3, 4, 5]] (times 40): from the standard's own definitions
# of which side of the picture row 0 and column 0 are.
STORED = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[2, 5], [1, 4], [0, 3]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[3, 0], [4, 1], [5, 2]],
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray((np.array(STORED[orientation], np.uint8) * 40)[..., None].repeat(3, 2))
    options = {"lossless": True} if form == "WEBP" else {}
    shown = picture(stored, form, exif=exif, **options)
    assert (shown[..., 0] // 40).tolist() == STORED[1]


def test_an_orientation_that_does_not_exist_is_none():
    exif = Image.Exif()
    exif[0x0112] = 99
    assert picture(Image.new("RGB", (3, 2), (10, 20, 30)), exif=exif).shape == (2, 3, 3)


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (255, 0, 100, 51))
    assert picture(image, "TIFF")[0, 0].tolist() == [0, 204, 124]  # (255 - C)(255 - K) / 255
    assert np.abs(picture(image, "JPEG", quality=95)[8, 8].astype(int) - [0, 204, 124]).max() <= 4


def test_sixteen_bits():
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert picture(Image.fromarray(levels))[0, :, 0].tolist() == [0, 1, 128, 255]
    for pixels in (np.array([[70000]], np.int32), np.array([[0.5]], np.float32)):
        with pytest.raises(MediaError, match="pixels of no known range"):
            picture(Image.fromarray(pixels), "TIFF")


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert picture(image).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparency_is_white():
    layer = Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [100, 0, 0, 51]]], np.uint8))
    assert picture(layer).tolist() == [[[255, 255, 255], [255, 0, 0], [224, 204, 204]]]  # a * c + (1 - a) * 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    assert picture(palette, transparency=0).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    plain = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert picture(plain, transparency=(1, 2, 3)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(form):
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    assert picture(frames[0], form, save_all=True, append_images=frames[1:], **options)[0, 0].tolist() == [255, 0, 0]


def test_one_pixel():
    assert picture(Image.new("RGB", (1, 1), (1, 2, 3))).tolist() == [[[1, 2, 3]]]


def test_sixty_four_megapixels_are_read_and_more_are_not():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = picture(Image.new("L", (8000, 8000), 7), compress_level=1)
    assert large.shape == (8000, 8000, 3)
    assert large[::999, ::999].tolist() == [[[7, 7, 7]] * 9] * 9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 * 1024  # KiB; the pixels alone are 192 MB
    file = io.BytesIO()
    Image.new("1", (8001, 8000)).save(file, "PNG")
    with pytest.raises(MediaError, match="8001 x 8000 pixels, more than 64,000,000"):
        decode(Media("image", file.getvalue(), "a.png"))
    assert MAX_PIXELS == 64_000_000


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow warns of the one and refuses the other
def test_bombs_are_errors_and_not_warnings(side):
    file = io.BytesIO()
    Image.new("P", (1, 1)).save(file, "GIF")
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", side, side)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(MediaError, match="'bomb' has more pixels"):
        warnings.simplefilter("always")
        decode(Media("image", bytes(data), "bomb"))
    assert not caught


@pytest.mark.parametrize("header", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6 2 2 255 " + bytes(12)])
def test_formats_that_are_rare_or_run_programs_are_not_images(header):
    with pytest.raises(MediaError, match="is not an image that can be read"):
        decode(Media("image", header, "a.png"))


def test_eight_channels_are_kept():
    file = io.BytesIO()
    soundfile.write(file, np.tile(np.arange(8) / 16, (100, 1)), 8000, format="WAV", subtype="FLOAT")
    sound = decode(Media("audio", file.getvalue(), "a.wav"))
    assert isinstance(sound, Waveform)
    assert sound.samples.shape == (8, 100)
    assert sound.samples[:, 50].tolist() == [channel / 16 for channel in range(8)]


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_a_sound_without_samples_is_refused(form):
    file = io.BytesIO()
    soundfile.write(file, np.zeros((0, 1)), 8000, format=form)
    with pytest.raises(MediaError, match="'a.x' "):
        decode(Media("audio", file.getvalue(), "a.x"))


def test_samples_are_counted_over_all_channels(monkeypatch):
    file = io.BytesIO()
    soundfile.write(file, np.zeros((1000, 8)), 8000, format="WAV")
    monkeypatch.setattr("mm.datasets.decode.MAX_VALUES", 7999)
    with pytest.raises(MediaError, match="8,000 samples in 8 channels, more than 7,999"):
        decode(Media("audio", file.getvalue(), "a.wav"))


def clip(stamps: list[int]) -> Media:
    """Frame k is grey 20 * k, shown from stamps[k] tenths of a second on."""
    file = io.BytesIO()
    with av.open(file, "w", "matroska") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"bf": "0", "crf": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Media("video", file.getvalue(), "a.mkv")


def test_with_a_variable_frame_rate_a_frame_lasts_until_the_next():
    with decode(clip([0, 1, 5, 6, 20])) as opened:  # type: ignore[union-attr]
        assert [round(time, 3) for time in opened.times] == [0, 0.1, 0.5, 0.6, 2.0]  # type: ignore[union-attr]
        shown = opened.frames_at([0, 0.09, 0.1, 0.49, 0.5, 1.99, 2.0, 5])
    assert (shown.float().mean((1, 2, 3)) / 20).round().int().tolist() == [0, 0, 1, 1, 2, 3, 4, 4]


def test_frames_and_seconds_of_a_video_are_limited_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(video_clip, "MAX_FRAMES", 4)
    with pytest.raises(MediaError, match="'a.mkv' has more than 4 frames"):
        decode(clip([0, 1, 2, 3, 4]))
    monkeypatch.setattr(video_clip, "MAX_FRAMES", 10)
    monkeypatch.setattr(video_clip, "MAX_SECONDS", 1.0)
    with pytest.raises(MediaError, match=r"'a\.mkv' lasts \d s, more than 1"):
        decode(clip([0, 1, 20]))
