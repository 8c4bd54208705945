"""Media through the API itself: URLs lead nowhere they should not, and bombs cost the server next to nothing."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mm.serve.limits import MediaLimits, ServeLimits
from mm.serve.run import running

from .attack import CHAT, check_error, idle, within
from .bombs import BODIES, BOMBS
from .conftest import PUBLIC, Web
from .files import picture
from .hostile import PRIVATE, direct_urls

GROWTH = 64 * 2**20  # bytes
SERVED = """
import sys
from mm.serve.run import running
from mm.testing import tiny_model
with running(tiny_model(embedding_dim=8).eval()) as here:
    print(here.url, flush=True)
    sys.stdin.read()
"""


def asking(kind: str, url: str) -> dict[str, Any]:
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return CHAT | {"messages": [{"role": "user", "content": [part]}]}


def code(found: httpx.Response) -> str:
    return check_error(found.status_code, found.headers, found.content)


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_urls_lead_nowhere(web: Web, share: int, tell: Callable[[str], None], model: Any) -> None:
    """Directly, by redirect from an allowed host, and by a name whose address changes. One in `share` of them."""
    canary = int(web.canary.getsockname()[1])
    urls = direct_urls(canary)
    web.names["images.example"] = [[PUBLIC]]
    media, limits = MediaLimits(hosts=("images.example", "own.example")), ServeLimits(per_client=16)
    codes = Counter[str]()
    assert len(urls) >= 500
    with (
        running(model, network=web.network, media=media, limits=limits) as here,
        httpx.Client(base_url=here.url) as client,
    ):
        for url in urls[::share]:
            for kind in ("image", "audio", "video")[:: 3 if share > 1 else 1]:
                codes[code(client.post("/v1/chat/completions", json=asking(kind, url)))] += 1
            away = "http://images.example/redirect?to=" + "".join(f"%{byte:02x}" for byte in url.encode())
            if len(away) < 8_000:
                codes[code(client.post("/v1/embeddings", json={"model": "model", "input": [image(away)]}))] += 1
        for address in PRIVATE[::share]:
            web.names["own.example"] = [[address]]
            codes[code(client.post("/v1/chat/completions", json=asking("image", "http://own.example/file")))] += 1
            web.names["own.example"] = [[PUBLIC], [address]]  # rebound: what is asked twice has two addresses
            form = asking("image", "http://own.example/redirect?to=http://own.example/file")
            codes[code(client.post("/v1/explain", json={name: form[name] for name in ("model", "messages")}))] += 1
        assert within(5, lambda: idle(here))
    tell(f"{codes.total():,} URLs: {web.hits} hits on the canary, {dict(codes)}")
    assert web.hits == 0
    # Hosts that may be reached answer, but not with a picture.
    assert set(codes) <= {"url_not_allowed", "malformed_url", "url_not_fetched", "unsupported_media_type"}
    assert codes["url_not_allowed"] > 0.9 * codes.total()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="module")
def apart() -> Iterator[tuple[str, int]]:
    """The URL and the process of a server that is a process of its own."""
    with subprocess.Popen([sys.executable, "-c", SERVED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().decode().strip(), process.pid
        process.stdin.close()


def _status(process: int, key: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024


class Growth:
    """How much more a process has ever held than before each of many things; `most` of them."""

    def __init__(self, process: int) -> None:
        self._process, self.most, self.of = process, 0, ""

    def during(self, name: str, work: Callable[[], httpx.Response]) -> httpx.Response:
        Path(f"/proc/{self._process}/clear_refs").write_text("5")  # the peak is counted from here
        before = _status(self._process, "VmRSS")
        found = work()
        grown = _status(self._process, "VmHWM") - before
        self.most, self.of = max((self.most, self.of), (grown, name))
        return found


@pytest.mark.parametrize("share", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_bombs_cost_next_to_nothing(apart: tuple[str, int], share: int, tell: Callable[[str], None]) -> None:
    url, process = apart
    growth, count = Growth(process), Counter[str]()
    with httpx.Client(base_url=url, timeout=120) as client:

        def chat(form: dict[str, Any]) -> Callable[[], httpx.Response]:
            return lambda: client.post("/v1/chat/completions", json=form)

        def sent(body: bytes) -> Callable[[], httpx.Response]:
            return lambda: client.post(
                "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )

        def uploaded(data: bytes) -> Callable[[], httpx.Response]:
            return lambda: client.post("/v1/files", files={"file": ("a", data)}, data={"purpose": "user_data"})

        warm = asking("image", "data:image/png;base64," + base64.b64encode(picture()).decode())
        assert chat(warm)().status_code == 200
        for name, kind, expected, make in BOMBS[::share]:
            data = make()
            url = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
            whole = "body_too_large" if len(url) > MediaLimits().body_bytes else expected
            assert code(growth.during(f"{name}, as a data: URL", chat(asking(kind, url)))) == whole, name
            stored = growth.during(f"{name}, uploaded", uploaded(data)).json()["id"]
            part = {"type": "file", "file": {"file_id": stored}}
            form = CHAT | {"messages": [{"role": "user", "content": [part]}]}
            found = growth.during(f"{name}, by its id", chat(form))  # whose kind is what its bytes say
            count["read" if name == "a sound that is called an image" else code(found)] += 1
            client.delete(f"/v1/files/{stored}")
        for name, expected, make in BODIES[::share]:
            assert code(growth.during(name, sent(make()))) == expected, name
            count[expected] += 1
        assert chat(warm)().status_code == 200
    grown = f"{growth.most / 2**20:.1f} MB at most ({growth.of})"
    tell(f"{count.total()} bombs, each file as a data: URL and uploaded: {dict(count)}; the server grew by {grown}")
    assert growth.most < GROWTH, grown
