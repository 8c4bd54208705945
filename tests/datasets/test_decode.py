"""Every failure is one line that names the file; what can be read is read exactly."""

from __future__ import annotations

import errno
import io
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mm.datasets.decode import decode, decode_image
from mm.datasets.video_clip import VideoClip, codec_errors
from mm.tokenizers.image import ImageTokenizer
from mm.types import Clip, Kind, Media, MediaError, Waveform


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def wav(samples: np.ndarray, rate: int = 8000, format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def video(
    path: Path, codec: str = "libx264", stamps: list[int] | None = None, pixels: str = "yuv420p", **options: Any
) -> bytes:
    """A video whose k-th frame is grey 10 * k, shown at stamps[k] tenths of a second; a keyframe every 5 frames."""
    stamps = list(range(20)) if stamps is None else stamps
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.codec_context.gop_size = 5
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number % 256, np.uint8), format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def image(data: bytes | Path, **options: Any) -> torch.Tensor:
    pixels = decode(Media("image", data, "a.png"), **options)
    assert isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8
    assert pixels.is_contiguous() or pixels.permute(1, 2, 0).is_contiguous()  # colours outermost or innermost
    return pixels


def sound(data: bytes | Path, **options: Any) -> Waveform:
    waveform = decode(Media("audio", data, "a.wav"), **options)
    assert isinstance(waveform, Waveform) and waveform.samples.dtype == torch.float32
    return waveform


def clip(data: bytes | Path, **options: Any) -> VideoClip:
    opened = decode(Media("video", data, "a.mp4"), **options)
    assert isinstance(opened, VideoClip)
    return opened


def assert_refused(kind: Kind, data: bytes | Path, says: str, **options: Any) -> None:
    with pytest.raises(MediaError) as caught:
        opened = decode(Media(kind, data, "the name\nof.it"), **options)
        assert isinstance(opened, VideoClip)
        opened.frames_at(opened.times)
    message = str(caught.value)
    assert "the name\\nof.it" in message and "\n" not in message, message
    assert says in message


# --- Any kind


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_missing_empty_directory_and_text(kind: Kind, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    text = tmp_path / "text.png"
    text.write_text("this is not a media file\n" * 50)
    assert_refused(kind, tmp_path / "gone", "does not exist")
    assert_refused(kind, tmp_path, "is a directory")
    assert_refused(kind, empty, "empty")
    assert_refused(kind, b"", "empty")
    assert_refused(kind, text, "that can be read")
    assert_refused(kind, text.read_bytes(), "that can be read")


def test_every_prefix_of_a_file_is_refused_or_read(tmp_path: Path) -> None:
    """No cut, wherever it falls, escapes as anything but a MediaError."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    files = [Media("image", encoded(pixels, form), "cut") for form in ("PNG", "JPEG", "GIF", "WEBP")]
    files += [Media("audio", wav(np.zeros(100), format=form), "cut") for form in ("WAV", "FLAC")]
    files += [
        Media("video", video(tmp_path / "v.mp4"), "cut"),
        Media("video", video(tmp_path / "v.avi", "mpeg4"), "cut"),
    ]
    for media in files:
        assert isinstance(media.data, bytes)
        for length in range(1, len(media.data), max(1, len(media.data) // 40)):
            try:
                decode(replace(media, data=media.data[:length]))
            except MediaError as error:
                assert "cut" in str(error)


# --- Images


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncated_image(form: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), form)
    assert image(data).shape == (3, 64, 64)
    assert_refused("image", data[: len(data) // 2], "truncated")


def test_smallest_image() -> None:
    assert image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).flatten().tolist() == [1, 2, 3]


def test_rectangle_keeps_its_axes(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 3), np.uint8)
    path.write_bytes(encoded(Image.fromarray(pixels)))
    assert torch.equal(image(path), torch.from_numpy(pixels).permute(2, 0, 1))


def test_exif_orientation_is_applied() -> None:
    stored = Image.new("RGB", (3, 2))
    stored.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise to be upright
    pixels = image(encoded(stored, exif=exif))
    assert pixels.shape == (3, 3, 2)
    assert pixels[:, 0, 1].tolist() == [255, 0, 0]


def test_transparent_is_white() -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert image(encoded(half)).flatten().tolist() == [127] * 3
    grey = Image.new("LA", (1, 1), (0, 0))
    assert image(encoded(grey)).flatten().tolist() == [255] * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert image(encoded(palette)).flatten(1).T.tolist() == [[10, 20, 30], [40, 50, 60]]
    assert image(encoded(palette, transparency=1)).flatten(1).T.tolist() == [[10, 20, 30], [255, 255, 255]]
    keyed = encoded(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))
    assert image(keyed).flatten().tolist() == [255] * 3


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 257, 32_896, 65_535]], np.uint16))
    for form in ("PNG", "TIFF"):
        assert image(encoded(grey, form))[0, 0].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_range_are_refused() -> None:
    assert_refused("image", encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point")
    assert_refused("image", encoded(Image.fromarray(np.array([[70_000]], np.int32)), "TIFF"), "32-bit")


def test_other_modes() -> None:
    assert image(encoded(Image.new("1", (1, 1), 1))).flatten().tolist() == [255] * 3
    assert image(encoded(Image.new("L", (1, 1), 7))).flatten().tolist() == [7] * 3
    assert image(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")).flatten().tolist() == [255, 0, 0]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image(data)[:, 0, 0].tolist() == [255, 0, 0]


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (9000, 8000)))  # 72 MP in a few kB
    assert_refused("image", data, "9000 x 8000")
    assert image(encoded(Image.new("1", (30, 40))), max_pixels=1200).shape == (3, 40, 30)
    assert_refused("image", encoded(Image.new("1", (30, 41))), "more than 1,200", max_pixels=1200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow only warns from here to twice as much
    assert_refused("image", encoded(Image.new("1", (30, 40))), "Pillow")
    assert_refused("image", encoded(Image.new("1", (300, 40))), "Pillow")


# --- Sound


def test_wav_is_exact() -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (50, 2)).astype(np.int16)
    waveform = sound(wav(samples, 12_345))
    assert waveform.rate == 12_345
    assert torch.equal(waveform.samples, torch.from_numpy(samples.T.astype(np.float32) / 2**15))


def test_no_samples() -> None:
    assert_refused("audio", wav(np.zeros(0)), "0 samples")
    assert_refused("audio", wav(np.zeros((0, 2))), "0 samples")


def test_truncated_sound() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 40_000)
    for form in ("WAV", "FLAC"):
        data = wav(noise, format=form)
        assert_refused("audio", data[: len(data) // 2], "truncated")
    streamed = bytearray(wav(noise))
    streamed[4:8] = streamed[40:44] = b"\xff\xff\xff\xff"  # what FFmpeg writes to a pipe: the length is not known
    assert sound(bytes(streamed)).samples.shape[1] == 40_000


def test_floats_are_finite_and_within_one() -> None:
    loud = wav(np.array([0.5, -4.0, 2.0]), subtype="FLOAT")
    assert sound(loud).samples.tolist() == [[0.125, -1.0, 0.5]]
    assert_refused("audio", wav(np.array([0.5, np.nan]), subtype="FLOAT"), "not finite")


def test_too_long_sound() -> None:
    assert sound(wav(np.zeros(8000)), max_seconds=1).samples.shape == (1, 8000)
    assert_refused("audio", wav(np.zeros(8001)), "longer than 1 s", max_seconds=1)


@pytest.mark.parametrize("suffix, codec", [("m4a", "aac"), ("mp3", "mp3"), ("webm", "libopus"), ("ogg", "libopus")])
def test_compressed_sound(suffix: str, codec: str, tmp_path: Path) -> None:
    """A tone comes back with its pitch, rate, length and two channels, whichever library reads it."""
    path, rate = tmp_path / f"a.{suffix}", 48_000
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32) / 2
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([tone, 0 * tone]), format="fltp", layout="stereo")
        frame.rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    waveform = sound(path)
    assert waveform.rate == rate and waveform.samples.shape[0] == 2
    assert abs(waveform.samples.shape[1] - rate) < 4000  # encoders pad with a few blocks of about 1,000 samples
    left = waveform.samples[0, rate // 4 : rate // 4 + rate // 2]
    assert torch.fft.rfft(left).abs().argmax() == 500  # 1,000 Hz over half a second
    assert waveform.samples[1].abs().max() < 0.05
    if suffix in ("m4a", "webm"):
        assert_refused("audio", path, "longer than", max_seconds=0.5)


def test_video_without_sound(tmp_path: Path) -> None:
    assert_refused("audio", video(tmp_path / "v.mp4"), "no audio track")


# --- Video


CONTAINERS = [
    ("mp4", "libx264", {}),
    ("mkv", "libx264", {}),
    ("webm", "libvpx-vp9", {}),
    ("ts", "libx264", {}),
    ("avi", "libx264", {}),
    ("avi", "mpeg4", {"max_b_frames": 2, "bit_rate": 4_000_000}),
    ("gif", "gif", {"pixels": "rgb8"}),
]


@pytest.mark.parametrize("suffix, codec, options", CONTAINERS)
def test_every_frame_in_any_order(suffix: str, codec: str, options: dict[str, Any], tmp_path: Path) -> None:
    opened: Clip = clip(video(tmp_path / f"v.{suffix}", codec, **options))
    assert opened.size == (48, 64)
    assert opened.duration == pytest.approx(2.0)
    order = np.random.default_rng(0).permutation(20).tolist()
    for times in ([k / 10 for k in order], [k / 10 + 0.05 for k in order]):  # at a frame's start, and while it shows
        frames = opened.frames_at(times)
        assert frames.shape == (20, 3, 48, 64) and frames.dtype == torch.uint8
        shown = frames.float().mean(dim=(1, 2, 3))
        # 4: lossy codecs and 8-bit palettes move a grey by a few levels; frames are 10 apart.
        assert torch.allclose(shown, 10.0 * torch.tensor(order), atol=4.9)
        for time, expected in zip(times[:3], shown, strict=False):  # one by one: each is a seek
            assert torch.allclose(opened.frames_at([time]).float().mean(), expected)


def test_variable_frame_rate(tmp_path: Path) -> None:
    opened = clip(video(tmp_path / "v.mp4", stamps=[0, 1, 2, 12, 13, 30]))
    seconds = [0.0, 0.15, 0.2, 0.7, 1.19, 1.2, 1.5, 2.9, 3.0]
    shown = opened.frames_at(seconds).float().mean(dim=(1, 2, 3)) / 10
    assert shown.round().tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 5]
    assert opened.times == pytest.approx([0, 0.1, 0.2, 1.2, 1.3, 3.0])


def test_times_outside_the_clip_and_none(tmp_path: Path) -> None:
    opened = clip(video(tmp_path / "v.mp4"))
    shown = opened.frames_at([-1.0, 99.0]).float().mean(dim=(1, 2, 3))
    assert (shown / 10).round().tolist() == [0, 19]
    assert opened.frames_at([]).shape == (0, 3, 48, 64)


def test_only_the_frames_needed_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = clip(video(tmp_path / "v.mp4", stamps=list(range(100))))
    decoded: list[int] = []
    forward = VideoClip._forward

    def counted(self: VideoClip, stamp: int) -> Any:
        playing = self._playing
        self._playing = (decoded.append(item[0]) or item for item in playing)
        frame = forward(self, stamp)
        self._playing = playing
        return frame

    monkeypatch.setattr(VideoClip, "_forward", counted)
    opened.frames_at([5.05, 9.05])
    assert len(decoded) <= 2 * 5  # keyframes are 5 frames apart
    decoded.clear()
    opened.frames_at([9.15, 9.25])  # goes on from where it stopped
    assert len(decoded) == 2


def test_rotated_video_is_upright(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    bright = np.zeros((48, 64, 3), np.uint8)
    bright[:24, 32:] = 255  # top right
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(bright, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    matrix = data.index(b"tkhd") + 4 + 40  # version and flags, times, ids, layer, volume
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # 90 degrees clockwise
    opened = clip(data[:matrix] + turn + data[matrix + 36 :])
    assert opened.size == (64, 48)
    frame = opened.frames_at([0])[0].float().mean(dim=0)
    assert frame[34:62, 26:46].mean() > 200  # bottom right
    assert frame[2:30].mean() < 30


def test_truncated_or_unsuitable_video(tmp_path: Path) -> None:
    data = video(tmp_path / "v.mp4")
    assert_refused("video", data[: len(data) * 3 // 4], "truncated")
    assert_refused("video", wav(np.zeros(800)), "no video track")
    assert_refused("video", data, "64 x 48", max_pixels=64 * 48 - 1)
    assert clip(data, max_pixels=64 * 48).duration == pytest.approx(2.0)


def test_video_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    assert_refused("video", path, "no frames")


def test_damaged_frames_are_a_media_error_or_are_concealed(tmp_path: Path) -> None:
    data = bytearray(video(tmp_path / "v.mp4"))
    start = data.index(b"mdat") + 8
    data[start:] = bytes(len(data) - start)
    assert_refused("video", bytes(data), "damaged")


def test_what_ffmpeg_will_not_allocate_is_a_damaged_file_and_what_the_machine_cannot_is_not() -> None:
    with (
        pytest.raises(MediaError, match=r"a\.mov is damaged \(Cannot allocate memory\)"),
        codec_errors("a.mov", "is damaged"),
    ):
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(MemoryError, match="^the machine's$"), codec_errors("a.mov", "is damaged"):
        raise MemoryError("the machine's")


def test_a_playlist_cannot_open_other_files(tmp_path: Path) -> None:
    video(tmp_path / "secret.mp4")
    concat = tmp_path / "v.mp4"
    concat.write_text(f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n")
    with av.open(str(concat), format="concat", options={"safe": "0"}) as container:  # the trap is real
        assert container.streams.video
    assert_refused("video", concat, "that can be read")
    assert_refused("video", concat.read_bytes(), "that can be read")


def test_one_frame(tmp_path: Path) -> None:
    opened = clip(video(tmp_path / "v.mp4", stamps=[0]))
    assert opened.frames_at([0, 5]).shape == (2, 3, 48, 64)
    assert opened.duration == pytest.approx(0.1)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = video(tmp_path / "v.mp4")
    capfd.readouterr()  # x264 may greet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused("video", data[: len(data) * 3 // 4], "truncated")
        assert_refused("audio", b"x" * 999, "that can be read")
    assert capfd.readouterr() == ("", "")


# JPEGs at the size that is needed


def photograph(height: int, width: int, **options: Any) -> bytes:
    """A smooth picture, as photographs are at the scale of their pixels."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([128 + 100 * np.sin(rows / 40 + c) * np.cos(columns / (30 + c)) for c in range(3)], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


class Asks:
    """A resizer of a fixed wish, which notes what it is given."""

    def __init__(self, wanted: tuple[int, int]) -> None:
        self.wanted, self.given = wanted, ()

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        return self.wanted

    def resize(self, frames: torch.Tensor, size: tuple[int, int], covered: tuple[float, float]) -> torch.Tensor:
        assert size == self.wanted
        self.given = (*frames.shape[-2:], *covered)
        return frames


@pytest.mark.parametrize(
    ("wanted", "size", "factor"),
    [((600, 801), (600, 801), 1), ((301, 400), (600, 801), 1), ((300, 400), (300, 401), 2), ((150, 200), (150, 201), 4),
     ((75, 101), (150, 201), 4), ((10, 10), (75, 101), 8), ((1000, 1000), (600, 801), 1)],
)  # fmt: skip
def test_a_jpeg_is_decoded_no_larger_than_is_needed(wanted: Any, size: Any, factor: int) -> None:
    data = photograph(600, 801)
    asks = Asks(wanted)
    found = decode_image(Media("image", data, "a.jpg"), resizer=asks)
    assert asks.given == (*size, 600 / factor, 801 / factor) and tuple(found.shape[1:]) == size
    whole = decode_image(Media("image", data, "a.jpg")).float()
    assert torch.equal(whole, torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).float())


def test_the_size_that_is_needed_is_of_the_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    media = Media("image", photograph(400, 804, exif=exif.tobytes()), "a.jpg")
    assert decode_image(media).shape == (3, 804, 400)
    asks = Asks((201, 100))
    assert decode_image(media, resizer=asks).shape == (3, 201, 100) and asks.given == (201, 100, 201, 100)


@pytest.mark.parametrize(
    ("form", "height", "width"),
    [
        ("JPEG", 900, 1333),
        ("JPEG", 1723, 898),
        ("JPEG", 300, 200),
        ("JPEG", 83, 91),
        ("PNG", 300, 200),
        ("PNG", 83, 91),
    ],
)
def test_tokens_are_those_of_the_whole_image(form: str, height: int, width: int) -> None:
    tokenizer = ImageTokenizer(patch=14, max_tokens=64)
    data = photograph(height, width)
    if form == "PNG":
        data = encoded(Image.open(io.BytesIO(data)))
    media = Media("image", data, "a")
    whole, resized = tokenizer(decode_image(media)), tokenizer(decode_image(media, resizer=tokenizer))
    assert torch.equal(whole.grid, resized.grid)
    difference = (whole.values.float() - resized.values.float()).abs()
    assert difference.mean() < (1.5 if form == "JPEG" else 1e-9)


def test_what_simplejpeg_refuses_is_for_pillow_to_judge() -> None:
    data = photograph(60, 80)
    odd = data[:-2] + b"\0\0\0" + data[-2:]  # "extraneous bytes before marker": common, and harmless
    assert torch.equal(image(odd), image(data))
    with pytest.raises(MediaError, match="damaged or truncated"):
        image(data[: len(data) // 2])
