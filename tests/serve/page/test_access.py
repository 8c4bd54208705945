"""The page by keyboard, for who cannot see it, and on a phone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ..files import film, harmless, picture
from .driven import Driven, events, scripted

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow
PHONE = {"width": 360, "height": 740}
FOCUSABLE = "button, a[href], input, select, textarea, summary, audio, video, iframe, [tabindex='0']"


def reached(page: Page, within: str = "body") -> list[str]:
    """What the Tab key comes to that has no visible focus; fails where it does not come to every control."""
    page.evaluate("document.activeElement.blur()")
    wanted = page.evaluate(
        """([within, focusable]) => {
            for (const node of document.querySelectorAll('[data-at]')) delete node.dataset.at;
            return [...document.querySelector(within).querySelectorAll(focusable)].filter(
                node => node.checkVisibility({visibilityProperty: true}) && !node.disabled && node.tabIndex >= 0
            ).map((node, at) => (node.dataset.at = at)); }""",
        [within, FOCUSABLE],
    )
    seen, unseen = set(), []
    for _ in range(8 * len(wanted)):  # a player of sound has many controls of its own
        page.keyboard.press("Tab")
        at, outlined, name = page.evaluate(
            """() => { const node = document.activeElement, style = getComputedStyle(node);
            const around = node.id === 'question' && getComputedStyle(node.closest('.box')).boxShadow;
            const ringed = style.outlineStyle !== 'none' || (around && around.includes(' 0px 0px 0px 1px'))
                || node.matches('audio, video');  // their controls are the browser's
            return [node.dataset.at, Boolean(ringed), node.outerHTML.slice(0, 80)]; }"""
        )
        seen.add(at)
        if at is not None and not outlined:
            unseen.append(name)
        if len(seen - {None}) == len(wanted):
            break
    missed = {str(at) for at in wanted} - seen
    assert not missed, [page.locator(f"[data-at='{at}']").evaluate("node => node.outerHTML") for at in missed]
    return unseen


def test_everything_is_reached_by_keyboard(driven: Driven) -> None:
    page = driven.page
    assert reached(page) == []
    driven.set(max_tokens=2)
    driven.attach(("shape.png", "image/png", picture(side=8)), ("film.mp4", "video/mp4", film()))
    page.locator("#attachments video").wait_for()
    scripted(driven, events({"reasoning_content": "Hm."}, {"content": "```\ncode\n```\n\nhttps://example.org/"}))
    driven.ask("what?")
    assert reached(page) == []
    page.click("#open-settings")
    assert reached(page, "#settings") == []
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-look").is_visible() and page.evaluate("document.activeElement.id") == "tab-look"
    page.keyboard.press("Home")
    assert page.locator("#panel-chat").is_visible()
    page.fill("#question", "one")
    page.press("#question", "Shift+Enter")
    assert page.input_value("#question") == "one\n" and page.locator(".turn").count() == 1


def test_controls_have_names(driven: Driven) -> None:
    driven.set(max_tokens=2)
    driven.attach(("shape.png", "image/png", picture(side=8)))
    driven.ask("what?")
    nameless = driven.page.locator("button, input, select, textarea, iframe, img, [role]").evaluate_all(
        """all => all.filter(node => node.checkVisibility() && !(node.ariaLabel || node.title || node.alt
            || node.labels?.length || node.textContent.trim() || node.hasAttribute('aria-labelledby')
            || node.getAttribute('role') === 'alert' || node.getAttribute('role') === 'status'))
            .map(node => node.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    log = driven.page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite"
    assert driven.turn(1).locator(".answer").get_attribute("aria-busy") == "false"


def test_nothing_is_wider_than_a_phone(driven: Driven) -> None:
    driven.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert driven.overflow() == 0
    table = "| " + "cell | " * 30 + "\n|" + "---|" * 30
    wide = "\n\n".join(["w" * 300, "```\n" + "c" * 300 + "\n```", table, "`" + "i" * 200 + "`"])
    driven.attach(
        ("a" * 90 + ".png", "image/png", picture(side=300)),
        ("film.mp4", "video/mp4", film()),
        *((f"{form}.x", "audio/x", data) for form, kind, data in harmless() if (form, kind) == ("WAV", "audio")),
    )
    driven.page.locator("#attachments audio").wait_for()
    assert driven.overflow() == 0
    scripted(driven, events({"content": wide}))
    driven.ask("q" * 300)
    assert driven.overflow() == 0
    driven.turn(1).get_by_role("button", name="Edit").click()
    assert driven.overflow() == 0
    driven.page.click("#open-settings")
    dialog = driven.page.locator("dialog#settings").bounding_box()
    assert driven.overflow() == 0 and dialog and dialog["x"] >= 0 and dialog["x"] + dialog["width"] <= 360
    driven.page.keyboard.press("Escape")
    driven.page.get_by_role("tab", name="Where it looked").click()
    driven.page.locator("#look-frame").wait_for()
    assert driven.overflow() == 0
    assert driven.looked("page => page.documentElement.scrollWidth") <= 360
