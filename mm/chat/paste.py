"""Paths of media files in a typed line: what a terminal inserts when a file is pasted or dropped on it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mm.datasets.source import SUFFIXES
from mm.types import Kind

# A quoted run, or a run without spaces in which a backslash protects the next character: how shells write a path.
WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\])+""")


def media_in(line: str) -> tuple[str, list[tuple[Kind, str]]]:
    """The line without the paths of existing media files in it, and those files with their kinds, in order.

    A path may be plain, quoted, with escaped spaces, or a file:// address; it must be a word of its own, or the whole
    line. Its suffix says the kind. Everything else, also a name of a file that does not exist, stays text.
    """
    if whole := _media_file(line.strip()):
        return "", [whole]
    found: list[tuple[Kind, str]] = []

    def take(word: re.Match[str]) -> str:
        media = _media_file(_unquoted(word.group()))
        if media is None:
            return word.group()
        found.append(media)
        return ""

    text = WORD.sub(take, line)
    return (" ".join(text.split(" ")).strip() if found else line), found


def _unquoted(word: str) -> str:
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word)


def _media_file(name: str) -> tuple[Kind, str] | None:
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None or "\0" in name or len(name) > 4096 or not path.is_file():
        return None
    return kind, str(path)
