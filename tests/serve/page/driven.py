"""The page in a browser, as tests drive it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Request


class Driven:
    """The page, what its browser complained of, and what it asked the server."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.elsewhere: list[str] = []
        page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._note)
        page.set_default_timeout(20_000)
        self.open()

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.locator("#invitation:not(:empty)").wait_for()

    def _note(self, request: Request) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.elsewhere.append(request.url)
        if request.post_data:
            self.asked.append((request.url.removeprefix(self.url), json.loads(request.post_data)))

    @property
    def last(self) -> dict[str, Any]:
        """The body of the last request."""
        return self.asked[-1][1]

    def turn(self, number: int) -> Locator:
        return self.page.locator(f".turn:nth-child({number})")

    def answer(self, number: int) -> str:
        return self.turn(number).locator(".answer > .text").inner_text()

    def ask(self, text: str, number: int = 1, state: str = "done") -> str:
        """Asks with the keyboard, waits for what becomes of the answer, returns it."""
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")
        self.ended(number, state)
        return self.answer(number)

    def ended(self, number: int, state: str) -> None:
        self.turn(number).locator(f".answer[data-state={state}]").wait_for()

    def set(self, **values: object) -> None:
        """A temperature too, so that a random model says something."""
        self.page.click("#open-settings")
        for name, value in {"temperature": 1, **values}.items():
            self.page.fill(f"#setting-{name}", str(value))
        self.page.get_by_role("button", name="Done").click()

    def attach(self, *files: tuple[str, str, bytes]) -> None:
        """(name, type, data) each."""
        payload: Any = [{"name": name, "mimeType": kind, "buffer": data} for name, kind, data in files]
        self.page.set_input_files("#files", payload)

    def looked(self, function: str) -> Any:
        """What a function makes of the document in the second tab's frame, asked from outside: nothing runs inside."""
        return self.page.locator("#look-frame").evaluate(f"frame => ({function})(frame.contentDocument)")

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


def scripted(driven: Driven, text: str, status: int = 200, **headers: str) -> None:
    """From now on every answer is this one: events, or the body of a refusal."""
    kind = "text/event-stream" if status == 200 else "application/json"
    fulfil = lambda route: route.fulfill(status=status, headers={"Content-Type": kind, **headers}, body=text)  # noqa: E731
    driven.page.route("**/v1/chat/completions", fulfil)


def events(*deltas: dict[str, str], end: str = "data: [DONE]\n\n") -> str:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
