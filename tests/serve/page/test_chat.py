"""Asking, on the page of `mm serve`, in a real browser against a real server with a tiny model."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from mm.serve.run import Running, running
from mm.testing import tiny_model

from ..files import picture
from .driven import Driven, events, scripted

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow


def test_an_answer_about_a_picture_comes_bit_by_bit(driven: Driven, pace: Callable[[float], None]) -> None:
    pace(0.02)
    driven.set(max_tokens=40, seed=1)
    data = picture(side=8)
    driven.attach(("shape.png", "image/png", data))
    driven.page.locator("#attachments img").wait_for()
    lengths = driven.page.evaluate_handle(
        """() => { const seen = [];
        new MutationObserver(() => { const text = document.querySelector('.answer > .text');
            if (text && text.textContent.length !== seen.at(-1)) seen.push(text.textContent.length); })
            .observe(document.getElementById('turns'), {subtree: true, childList: true, characterData: true});
        return seen; }"""
    )
    answer = driven.ask("what shape?")
    seen = [length for length in lengths.json_value() if length]
    assert answer and len(seen) > 5 and seen == sorted(seen)
    path, asked = driven.asked[-1]
    assert path == "/v1/chat/completions" and asked["stream"] and asked["max_tokens"] == 40 and asked["seed"] == 1
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what shape?"}]
    assert asked["messages"] == [{"role": "user", "content": parts}]
    assert driven.turn(1).locator(".media img").evaluate("image => image.naturalWidth") == 8
    assert "40 tokens" in driven.turn(1).locator(".facts").inner_text()
    assert driven.page.locator("#attachments li").count() == 0


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_was_written(driven: Driven, here: Running, pace: Callable[[float], None], how: str) -> None:
    pace(0.03)
    driven.set(max_tokens=400, seed=1)
    driven.page.fill("#question", "what color?")
    driven.page.press("#question", "Enter")
    driven.turn(1).locator(".answer > .text:not(:empty)").wait_for()
    if how == "button":
        driven.page.get_by_role("button", name="Stop").click()
    else:
        driven.page.keyboard.press("Escape")
    driven.ended(1, "stopped")
    written = driven.answer(1)
    assert "Stopped here." in driven.turn(1).inner_text()
    assert driven.page.get_by_role("button", name="Send").is_visible()
    until = time.monotonic() + 5
    while here.server.places.used and time.monotonic() < until:
        time.sleep(0.02)
    assert here.server.places.used == 0, "the server goes on with an answer that nobody wants"
    time.sleep(0.3)
    assert driven.answer(1) == written
    pace(0)
    driven.set(max_tokens=3)
    driven.ask("and now?", 2)
    assert [each["role"] for each in driven.last["messages"]] == ["user", "assistant", "user"]


def test_an_answer_is_drawn_again_and_a_question_changed(driven: Driven) -> None:
    driven.set(max_tokens=6, seed=1)
    driven.attach(("shape.png", "image/png", picture(side=8)))
    driven.ask("first?")
    driven.ask("second?", 2)
    before = driven.last
    driven.turn(2).get_by_role("button", name="Regenerate").click()
    driven.ended(2, "done")
    assert driven.last == before and len(driven.asked) == 3
    assert "The same answer as before" in driven.turn(2).inner_text(), "a seed draws it again"
    driven.turn(1).get_by_role("button", name="Edit").click()
    assert driven.page.input_value("#question") == "first?"
    assert driven.page.locator("#attachments img").count() == 1
    driven.page.get_by_role("button", name="Keep it as it was").click()
    assert driven.page.input_value("#question") == "" and driven.page.locator(".turn").count() == 2
    driven.turn(1).get_by_role("button", name="Edit").click()
    driven.ask("changed?")
    assert driven.page.locator(".turn").count() == 1
    [message] = driven.last["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][1]["text"] == "changed?"
    driven.page.get_by_role("button", name="New chat").click()
    assert driven.page.locator(".turn").count() == 0 and driven.page.locator("#empty").is_visible()


def test_where_it_looked(driven: Driven) -> None:
    page = driven.page
    driven.set(max_tokens=4)
    tab = page.get_by_role("tab", name="Where it looked")
    tab.click()
    assert "Nothing to look at yet" in page.locator("#panel-look").inner_text()
    page.get_by_role("tab", name="Chat").click()
    driven.attach(("shape.png", "image/png", picture(side=8)))
    driven.ask("what shape?")
    driven.ask("why?", 2)
    tab.click()
    page.locator("#look-frame").wait_for()
    title = "page => page.querySelector('h1').textContent"
    assert driven.looked(title) == "why?", "the newest comes first"
    page.get_by_role("tab", name="Chat").click()
    driven.turn(1).get_by_role("button", name="Where it looked").click()
    page.locator("#look-state").wait_for(state="hidden")
    assert driven.looked(title) == "what shape?"
    path, asked = driven.asked[-1]
    assert path == "/v1/explain" and asked["messages"] == driven.asked[0][1]["messages"] and asked["answer"]
    overlay = "page => page.querySelector('.look img')"
    assert driven.looked(f"page => ({overlay})(page).checkVisibility() && ({overlay})(page).naturalWidth") > 0
    style = "page => getComputedStyle(({})(page)).{}"
    assert driven.looked(style.format(overlay, "position")) == "absolute", "the styles of the page are missing"
    bar = driven.looked(style.format("page => page.querySelector('.stack i')", "flexGrow"))
    assert 0 < float(bar) < 1, "the styles of single elements are missing"
    shown = "page => page.querySelector('.panel-1').checkVisibility()"
    assert not driven.looked(shown)
    place = driven.looked(
        """page => { const step = page.querySelector('#step-1 + span'); step.scrollIntoView({block: 'center'});
        const {x, y, width, height} = step.getBoundingClientRect(); return [x + width / 2, y + height / 2]; }"""
    )
    page.locator("#look-frame").click(position={"x": place[0], "y": place[1]})
    assert driven.looked(shown)
    page.select_option("#look-choice", index=1)
    assert driven.looked(title) == "why?"
    assert [path for path, _ in driven.asked].count("/v1/explain") == 2, "what is known is not asked again"


def test_settings_are_kept_and_sent(driven: Driven) -> None:
    driven.set(system="Be brief.", temperature=0.5, top_p=0.9, top_k=7, seed=3, max_tokens=2)
    driven.open()
    driven.ask("what?")
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_tokens": 2}
    assert {name: driven.last.get(name) for name in wanted} == wanted
    assert driven.last["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "thinking" not in driven.last, "this model has no tags for it"
    driven.set(temperature=9)
    driven.page.click("#open-settings")
    assert "A number from 0 to 2" in driven.page.locator("#setting-temperature-hint").inner_text()
    driven.page.get_by_role("button", name="Defaults").click()
    assert [driven.page.input_value(f"#setting-{name}") for name in ("top_k", "temperature")] == ["", "0"]
    driven.page.fill("#setting-temperature", "")
    driven.page.keyboard.press("Escape")
    scripted(driven, events({"content": "four"}))
    driven.ask("what?", 2)
    assert set(driven.last) == {"model", "messages", "stream", "stream_options"}


def test_refusals_are_told_in_plain_words(driven: Driven) -> None:
    busy = {"code": "server_busy", "message": "Fixed.", "request_id": "abc123"}
    scripted(driven, json.dumps({"error": busy}), 503, **{"Retry-After": "2"})
    driven.ask("what?", state="failed")
    trouble = driven.turn(1).locator(".trouble")
    assert "The server is busy with other questions." in trouble.inner_text() and "abc123" in trouble.inner_text()
    again = trouble.get_by_role("button")
    assert again.is_disabled() and "Try again in" in again.inner_text()
    driven.page.unroute("**/v1/chat/completions")
    unknown = {"code": "brand_new", "message": "A fixed sentence.", "request_id": "def456"}
    scripted(driven, events({"content": "so far"}, end=f"data: {json.dumps({'error': unknown})}\n\n"))
    trouble.get_by_role("button", name="Try again", exact=True).click()  # waits until it may
    driven.turn(1).get_by_text("A fixed sentence.").wait_for()
    assert driven.answer(1) == "so far" and "def456" in trouble.inner_text()
    driven.page.unroute("**/v1/chat/completions")
    scripted(driven, events({"content": "half"}, end=""))
    driven.ask("what?", 2, "failed")
    assert "ended in the middle" in driven.turn(2).inner_text()
    driven.page.unroute("**/v1/chat/completions")
    driven.page.route("**/v1/chat/completions", lambda route: route.abort())
    driven.ask("what?", 3, "failed")
    assert "cannot be reached" in driven.turn(3).inner_text()
    driven.page.unroute("**/v1/chat/completions")
    driven.ask("long " * 5_000, 4, "failed")  # the server's own refusal
    assert "longer than the model can read" in driven.turn(4).inner_text()
    assert len(driven.complaints) == 3 and all("Failed to load resource" in each for each in driven.complaints)
    driven.complaints.clear()  # the browser's own words for 503, for an aborted request and for 400


def test_a_browser_gives_the_key_as_a_password(browser: Browser) -> None:
    with running(tiny_model().eval(), name="tiny", api_key="secret") as here:
        with browser.new_context() as context:
            assert context.request.get(here.url).status == 401
        with browser.new_context(http_credentials={"username": "me", "password": "secret"}) as context:
            driven = Driven(context.new_page(), here.url)
            driven.set(max_tokens=2)
            driven.ask("what?")
            assert driven.complaints == []


def test_reasoning_is_folded_apart(driven: Driven) -> None:
    scripted(driven, events({"reasoning_content": "Let me "}, {"reasoning_content": "see."}, {"content": "Red."}))
    assert driven.ask("what?") == "Red."
    thoughts = driven.turn(1).locator(".reasoning .text")
    assert not thoughts.is_visible()
    driven.turn(1).get_by_text("Reasoning").click()
    assert thoughts.inner_text() == "Let me see."
    driven.turn(1).locator(".answer").get_by_role("button", name="Copy").click()
    driven.turn(1).get_by_text("Copied").wait_for()
    assert driven.page.evaluate("navigator.clipboard.readText()") == "Red."
