"""The option letter that a free answer to a multiple-choice question means, where the benchmark states no parser of its
own: MMStar and Video-MME as lmms-eval 0.7.3 scores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

LETTERS = tuple("ABCDEFGH")

# Announcements of an answer, matched in lower case. ("is" forms of other words are contained in the shorter ones, but
# each announcement is searched at its own first place, so they are not redundant.)
_SUBJECTS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_ANNOUNCED = (
    *(f"{article}{subject} is" for subject in _SUBJECTS for article in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# (rank, how a letter is written): higher ranks win, then later places.
_WRITTEN = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
_STARTS, _ENDS, _ANNOUNCES = 10, 9, 7


def extract_letter(response: str, choices: Sequence[str] | None = None) -> str:
    """The letter of `choices` (default A to H) that a response means; "" if it holds none, which counts as wrong.

    A letter that stands first counts most, then one that stands last, one that is announced ("the answer is"), "(A)",
    "A.", "A:", "A)", "A "; of equal ranks the last place wins, and of equal places the first choice. Only if there is
    none of these does a capital inside a word count. Letters are capitals.
    """
    if not response.strip():
        return ""
    text = response.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    letters = tuple(choices) if choices else LETTERS
    found = list(_candidates(f" {text} ", letters))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else ""


def _candidates(padded: str, letters: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(rank, place, letter). `padded` has a space on either side."""
    for rank, form in _WRITTEN:
        for letter in letters:
            place = padded.rfind(form.format(letter))
            if place >= 0:
                yield rank, place, letter
    lower = padded.lower()
    for announcement in _ANNOUNCED:
        at = lower.find(announcement)
        if at >= 0:
            places = ((padded.find(letter, at + len(announcement)), letter) for letter in letters)
            yield from ((_ANNOUNCES, place, letter) for place, letter in places if place >= 0)
    bare = padded.strip()
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            yield _STARTS, 0, letter
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            yield _ENDS, len(padded) - 1, letter
