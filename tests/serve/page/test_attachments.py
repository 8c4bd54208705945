"""Files, sounds and pictures that the page attaches to questions."""

from __future__ import annotations

import base64
import io

import pytest
import soundfile

from ..files import harmless, picture
from .driven import Driven

pytestmark = pytest.mark.slow


def test_every_format_is_sent_as_the_part_that_it_is(driven: Driven) -> None:
    driven.set(max_tokens=2)
    parts = {"image": "image_url", "video": "video_url"}
    for number, (form, kind, data) in enumerate(harmless(), 1):
        driven.attach((f"file.{form.lower()}", f"{kind}/{form.lower()}", data))
        driven.page.locator("#attachments li").wait_for()
        driven.ask("what?", number, "done")
        part = driven.last["messages"][-1]["content"][0]
        own = "input_audio" if form in ("WAV", "MP3") else "audio_url"
        assert part["type"] == parts.get(kind, own), form


def test_files_are_checked_before_they_are_sent(driven: Driven) -> None:
    big = b"\x89PNG\r\n\x1a\n" + bytes(10_000_001)
    cases = [
        (("a.bmp", "image/bmp", picture("BMP")), "a.bmp is of a format that is not known here"),
        (("b.png", "image/png", big), "b.png has 10 MB; the server takes a picture of at most 10 MB"),
        (("c.png", "image/png", b"\x89PNG\r\n\x1a\n" + bytes(60)), "c.png cannot be opened"),
        (("d.wav", "audio/wav", b""), "d.wav is empty"),
    ]
    notice = driven.page.locator("#notice")
    for file, said in cases:
        driven.attach(file)
        notice.get_by_text(said).wait_for()
    assert driven.page.locator("#attachments li").count() == 0
    driven.attach(*((f"{n}.png", "image/png", picture(side=4)) for n in range(17)))
    notice.get_by_text("16 files at most").wait_for()
    assert driven.page.locator("#attachments li").count() == 16
    driven.page.get_by_role("button", name="Remove 3.png").click()
    assert driven.page.locator("#attachments li").count() == 15
    notice.get_by_role("button").click()
    assert not notice.is_visible() and driven.asked == []


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_files_come_by_clipboard_and_by_mouse(driven: Driven, way: str) -> None:
    data = base64.b64encode(picture(side=4)).decode()
    driven.page.evaluate(
        """([way, data]) => { const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
        const held = new DataTransfer(); held.items.add(new File([bytes], 'held.png', {type: 'image/png'}));
        const options = {bubbles: true, cancelable: true};
        const paste = new ClipboardEvent('paste', {...options, clipboardData: held});
        if (way === 'paste') document.body.dispatchEvent(paste);
        else for (const type of ['dragenter', 'dragover', 'drop'])
            document.body.dispatchEvent(new DragEvent(type, {...options, dataTransfer: held})); }""",
        [way, data],
    )
    driven.page.locator("#attachments img[alt='held.png']").wait_for()
    assert not driven.page.locator("#drop").is_visible()


def test_a_sound_is_recorded(driven: Driven) -> None:
    driven.set(max_tokens=2)
    driven.page.get_by_role("button", name="Record sound").click()
    driven.page.locator(".clock", has_text="0:01").wait_for()
    driven.page.get_by_role("button", name="Attach", exact=True).click()
    driven.page.locator("#attachments audio").wait_for()
    driven.ask("how many beeps?")
    part = driven.last["messages"][0]["content"][0]
    assert part["input_audio"]["format"] == "wav"
    data = base64.b64decode(part["input_audio"]["data"])
    samples, rate = soundfile.read(io.BytesIO(data))
    assert soundfile.info(io.BytesIO(data)).subtype == "PCM_16"
    assert rate == 16_000 and samples.ndim == 1 and 0.9 < len(samples) / rate < 4
    assert abs(samples).max() > 0.05, "the browser's device beeps"
    driven.page.get_by_role("button", name="Record sound").click()
    driven.page.locator("#recording").wait_for()
    driven.page.keyboard.press("Escape")
    assert not driven.page.locator("#recording").is_visible() and driven.page.locator("#attachments li").count() == 0


def test_a_photo_and_a_clip_are_taken(driven: Driven) -> None:
    driven.set(max_tokens=2)
    camera = driven.page.get_by_role("button", name="Use the camera").last
    camera.click()
    driven.page.locator("#take-photo:enabled").click()
    driven.page.locator("#attachments img").wait_for()
    camera.click()
    driven.page.locator("#take-clip:enabled").click()
    driven.page.locator("#camera-state", has_text="0:01").wait_for()
    driven.page.get_by_role("button", name="Stop and attach").click()
    driven.page.locator("#attachments video").wait_for()
    assert not driven.page.locator("#camera-dialog").is_visible()
    driven.ask("what moves?")
    photo, clip, _ = driven.last["messages"][0]["content"]
    assert photo["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert clip["video_url"]["url"].startswith("data:video/webm;base64,")
