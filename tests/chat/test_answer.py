"""How answers are drawn: Markdown as it comes, and nothing in it that could steer the terminal."""

import io
import re

import pytest
from rich.console import Console

from mm.chat.answer import AnswerView, blocks, printable

ANSWER = """# Shapes

The **red** one, `a < b`, <b>html</b> and <image>.
Its second line.

| layer | share |
|---|---|
| 0 | 21 % |

1. first
2. second

```python
print("hi")
```

> quoted

The end."""


def drawn(text: str, size: int = 7, terminal: bool = False) -> str:
    """What stands on the console after `text` came in pieces of `size` characters."""
    file = io.StringIO()
    with AnswerView(Console(width=60, file=file, force_terminal=terminal)) as view:
        for start in range(0, len(text), size):
            view.push(text[start : start + size])
    return file.getvalue()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_pieces_do_not_matter(size):
    assert drawn(ANSWER, size) == drawn(ANSWER, 3)


def test_markdown_is_drawn():
    lines = drawn(ANSWER).splitlines()
    assert lines[0] == "Shapes"
    assert "The red one, a < b, <b>html</b> and <image>." in lines and "Its second line." in lines
    assert " 0      21 %" in lines and " 1 first" in lines and "\u258c quoted" in lines
    assert not any("**" in line or "```" in line for line in lines)
    assert all(line == line.rstrip() for line in lines if "print" not in line and line.strip())


def test_one_blank_line_between_blocks_and_none_around():
    lines = drawn("one\n\n- a\n- b\n\ntwo\n\n\n\nthree").splitlines()
    assert lines == ["one", "", " \u2022 a", " \u2022 b", "", "two", "", "three"]


def test_links_show_where_they_lead():
    assert "https://evil.example" in drawn("[your bank](https://evil.example)", terminal=True)
    assert "\x1b]8" not in drawn("[your bank](https://evil.example)", terminal=True)


def test_only_our_own_control_characters_reach_the_terminal():
    nasty = "\x1b]0;title\x07 \x1b[2J\x1b[31mred\x9b1A\r\u202egnp.exe **bold** `\x1b[5m` [x](\x1b]8;;http://e\x07)"
    shown = drawn(nasty, terminal=True)
    own = re.sub(r"\x1b\[[\d;?]*[mKAlhGH]", "", shown)  # colours, and the moves of the part that is redrawn
    assert "\x1b" not in own and "\x07" not in own and "\x9b" not in own and "\u202e" not in own
    assert "\x1b[2J" not in shown and "]0;title" in own


@pytest.mark.parametrize(
    "parts",
    [[""], ["one"], ["one\n", "two"], ["a\nb"], ["```\none\n\ntwo"], ["- a\n\n- b"], ["a\n", "# b", "c"], ["\n\na"]],
)
def test_blocks(parts):
    assert blocks("\n".join(parts)) == parts


def test_printable():
    assert printable("a\x1b\r\nb\tc \u00e9\u2066") == "a\nb\tc \u00e9"


def test_what_was_said_before_an_error_stays():
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), AnswerView(Console(width=60, file=file)) as view:
        view.push("half an ans")
        raise KeyboardInterrupt
    assert file.getvalue() == "half an ans\n"
