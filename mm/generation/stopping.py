"""Stop strings: an answer ends before the first of them."""

from __future__ import annotations

from collections.abc import Sequence


def cut_before(text: str, strings: Sequence[str]) -> str:
    """What stands before the first of the strings; all of it where there is none."""
    places = [place for string in strings if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text


def begun(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of the text one of the strings may begin with."""
    lengths = ((string, n) for string in strings for n in range(1, min(len(string), len(text) + 1)))
    return max((n for string, n in lengths if text.endswith(string[:n])), default=0)


class Cutter:
    """The same for text that comes in pieces: each `push` gives what no stop string can begin in any more."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held = strings, ""
        self.done = False  # whether a stop string was met

    def push(self, piece: str) -> str:
        if self.done:
            return ""
        text = self._held + piece
        whole = cut_before(text, self._strings)
        if len(whole) < len(text):
            self.done, self._held = True, ""
            return whole
        given = len(text) - begun(text, self._strings)
        self._held = text[given:]
        return text[:given]

    def flush(self) -> str:
        """What was held back, where no stop string came of it."""
        rest, self._held = self._held, ""
        return rest
