"""A browser, a server with a tiny model, and the page between them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from mm.generation import batching
from mm.serve.run import Running, running
from mm.testing import tiny_model

from .driven import Driven

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
DEVICES = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a tone, a green picture


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no browser can be driven without playwright")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, CHROMIUM)), own if os.path.exists(own) else None)
        if path is None:
            pytest.skip(
                f"no Chromium: none of {', '.join(CHROMIUM)} is on the PATH, and playwright has none of its own"
            )
        browser = playwright.chromium.launch(executable_path=path, args=DEVICES)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def here() -> Iterator[Running]:
    """A model whose answers end by their length alone,"""
    model = tiny_model().eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "stop_ids", lambda model: frozenset())
        with running(model, name="tiny") as here:
            yield here


@pytest.fixture
def driven(browser: Browser, here: Running) -> Iterator[Driven]:
    with browser.new_context(permissions=["microphone", "camera", "clipboard-read", "clipboard-write"]) as context:
        driven = Driven(context.new_page(), here.url)
        yield driven
    assert driven.complaints == []
    assert driven.elsewhere == []


@pytest.fixture
def pace(here: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes every token take so many seconds."""
    engine = here.server.worker.engine
    step = engine.step

    def set_pace(seconds: float) -> None:
        monkeypatch.setattr(engine, "step", lambda: (time.sleep(seconds), step()))

    return set_pace
