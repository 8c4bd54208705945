"""What the page draws of an answer: Markdown, and nothing that could run."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from mm.serve import app

from .driven import Driven, events, scripted

HOSTILE = """<img src=x onerror="window.caught=1"> <script>window.caught=1</script> <iframe src="javascript:1"></iframe>

[press](javascript:alert(1)) [press](data:text/html,x) [https://bank.example](https://evil.example/) \
![](https://evil.example/p.png) https://user:secret@evil.example/ <https://plain.example/a>

```html"><img src=x onerror=window.caught=1>
<b>not bold</b>
```

| <u>a</u> | b |
|---|---|
| [x](vbscript:1) | `<i>` |
"""


@pytest.mark.slow
def test_markup_in_an_answer_stays_text(driven: Driven) -> None:
    scripted(driven, events(*({"content": HOSTILE[at : at + 3]} for at in range(0, len(HOSTILE), 3))))
    text = driven.ask("what?")
    for shown in ('<img src=x onerror="window.caught=1">', "<script>", "(javascript:alert(1))", "<b>not bold</b>"):
        assert shown in text
    drawn = driven.turn(1).locator(".answer > .text")
    tags = drawn.evaluate("text => [...new Set([...text.querySelectorAll('*')].map(node => node.localName))]")
    plain = "p br a span div pre code button svg use table thead tbody tr th td"
    assert set(tags) <= set(plain.split())
    assert driven.page.evaluate("window.caught") is None
    links = drawn.locator("a").evaluate_all("all => all.map(link => [link.href, link.rel, link.textContent])")
    assert [href for href, _, _ in links] == [
        "https://evil.example/",
        "https://evil.example/p.png",
        "https://plain.example/a",
    ]
    assert all(rel == "noopener noreferrer" for _, rel, _ in links)
    assert "https://bank.example (https://evil.example/)" in text, "a link says where it leads"


@pytest.mark.slow
def test_nothing_runs_where_an_answer_is_explained(driven: Driven) -> None:
    html = "<!doctype html><style>p { color: rgb(1, 2, 3) }</style><p style='margin: 7px' style=\"top: 1px\">here</p>"
    html += "<script>parent.caught = 1</script><img src=x onerror='parent.caught = 1'>"
    driven.page.route("**/v1/explain", lambda route: route.fulfill(json={"html": html}))
    scripted(driven, events({"content": "red"}))
    driven.ask("what?")
    driven.page.get_by_role("tab", name="Where it looked").click()
    driven.page.locator("#look-frame").wait_for()
    assert driven.looked("page => getComputedStyle(page.querySelector('p')).color") == "rgb(1, 2, 3)"
    driven.page.wait_for_timeout(500)  # in which the picture cannot be found
    assert driven.page.evaluate("window.caught") is None
    driven.complaints.clear()  # the browser tells what it refused


CASES = [
    ("a **b *c*** _d_ ~~e~~", "<p>a <strong>b <em>c</em></strong> <em>d</em> <del>e</del></p>"),
    ("2 * 3 * 4, snake_case_name, \\*no\\*", "<p>2 * 3 * 4, snake_case_name, *no*</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# A\n### B ##", "<h3>A</h3><h5>B</h5>"),
    ("`` a`b `` and `open", "<p><code>a`b</code> and `open</p>"),
    ("- a\n  - b\n    more\n- c", "<ul><li>a<ul><li>b<br>more</li></ul></li><li>c</li></ul>"),
    ("  - a\n  - b", "<ul><li>a</li><li>b</li></ul>"),
    ("3. a\n\n   b\n\n4. c", '<ol start="3"><li>a<p>b</p></li><li>c</li></ol>'),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("a\n\n---\n\n***", "<p>a</p><hr><hr>"),
    ("- ", "<ul><li></li></ul>"),
    ("**open and `code", "<p>**open and `code</p>"),
    ("a\u202eb\u0007c", "<p>abc</p>"),
    (">" * 500 + "x", None),
    ("- " * 500 + "x", None),
    ("*a **b " * 2_000, None),
    ("[" * 5_000 + "](" * 2_000, None),
]


@pytest.mark.slow
def test_markdown(driven: Driven) -> None:
    """Without an expectation: what is nested or left open without end is drawn, and soon."""
    wrong = []
    for text, html in CASES:
        begun = time.monotonic()
        drawn = driven.page.evaluate(
            """async text => { const { render } = await import('/page/markdown.js');
            const place = document.createElement('div'); render(text, place); return place.innerHTML; }""",
            text,
        )
        took = time.monotonic() - begun
        drawn = re.sub(' dir="auto"', "", drawn)
        if took > 2 or html not in (None, drawn):
            wrong.append((text[:80], drawn[:200], f"{took:.1f} s"))
    assert wrong == []


def test_the_sources_are_plain() -> None:
    """No turning of strings into HTML or code, nothing inline that the policy would refuse, nothing from elsewhere."""
    folder = Path(app.__file__).parent / "page"
    scripts = sorted(folder.glob("*.js"))
    assert scripts
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        assert not found, f"{path.name}: {found}"
        assert len(text.splitlines()) < 300, path.name
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=\"/page/)", html)
    used = {name for path in scripts for name in re.findall(r"byId\(\"([\w-]+)\"\)", path.read_text(encoding="utf-8"))}
    assert used and used <= set(re.findall(r'id="([\w-]+)"', html))
