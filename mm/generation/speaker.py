"""The tokens of an answer as they come -> its text: reasoning apart, cut before a stop string, whole characters.

Tags around reasoning are specials where the tokenizer has them, and then only the specials count; otherwise they are
found in the text, at its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from torch import Tensor

from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel
from mm.generation.stopping import Cutter, begun
from mm.generation.thinking import is_open
from mm.tokenizers.text import StreamDecoder


class Place(Enum):
    """Where an answer stands."""

    START, REASONING, BETWEEN, ANSWER = range(4)


class Splitter:
    """Text as it comes -> the answer in it. `reasoning` is what stood between the tags, None where there was none.

    Reasoning comes first or not at all: a tag in the middle of an answer is text. Line ends around it belong to
    neither. `opened`: the prompt has opened it already. `tags` None: `enter` and `leave` say where the tags stand.
    """

    def __init__(self, tags: tuple[str, str] | None, opened: bool) -> None:
        self._tags, self._held, self._reasoning = tags, "", ""
        self._place = Place.REASONING if opened else Place.START

    @property
    def reasoning(self) -> str | None:
        return self._reasoning.strip("\n") if self._place is Place.REASONING or self._reasoning else None

    def enter(self) -> None:
        if self._place is Place.START and not self._held.strip():
            self._place, self._held = Place.REASONING, ""

    def leave(self) -> None:
        if self._place is Place.REASONING:
            self._place = Place.BETWEEN

    def push(self, piece: str) -> str:
        """What of the answer is certain by now."""
        self._held += piece
        if self._place is Place.START:
            self._begin()
        if self._place is Place.REASONING:
            self._think()
        if self._place is Place.BETWEEN:
            self._held = self._held.lstrip("\n")
            if self._held:
                self._place = Place.ANSWER
        return self._take() if self._place is Place.ANSWER else ""

    def flush(self) -> str:
        """What was held back: of reasoning that never ended it belongs to the reasoning."""
        if self._place is not Place.REASONING:
            return self._take()
        self._reasoning += self._take()
        return ""

    def _begin(self) -> None:
        text = self._held.lstrip()
        if self._tags is not None and text.startswith(self._tags[0]):
            self._place, self._held = Place.REASONING, text[len(self._tags[0]) :]
        elif text and not (self._tags is not None and self._tags[0].startswith(text)):
            self._place = Place.ANSWER

    def _think(self) -> None:
        if self._tags is None:
            self._reasoning += self._take()
            return
        before, closing, after = self._held.partition(self._tags[1])
        if closing:
            self._reasoning, self._held, self._place = self._reasoning + before, after, Place.BETWEEN
        else:
            kept = len(before) - begun(before, [self._tags[1]])
            self._reasoning, self._held = self._reasoning + before[:kept], before[kept:]

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held


class Speaker:
    """`opening` (n,) int64 are the ids with which the template opened the answer's turn. Without one, it is text that
    goes on, and all of it is told, tags too."""

    def __init__(self, model: GenerativeModel, decoding: Decoding, opening: Tensor | None) -> None:
        tokenizer = model.tokenizer
        self._decoder = StreamDecoder(tokenizer, continues=opening is None)
        self._cutter = Cutter(decoding.stop_strings)
        if opening is None:
            self._specials, self._splitter = [None, None], Splitter(None, opened=False)
            return
        tags = decoding.thinking_tags or model.template.thinking_tags
        self._specials = [tokenizer.specials.get(tag) for tag in tags]
        self._splitter = Splitter(tags if None in self._specials else None, is_open(tokenizer, opening, tags))

    @property
    def reasoning(self) -> str | None:
        """What was thought before the answer, so far; None where nothing was."""
        return self._splitter.reasoning

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._cutter.done

    def push(self, *ids: int) -> str:
        """More tokens -> what they add to the answer."""
        return "".join(self._push(token) for token in ids)

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        rest = self._cutter.push(self._decoder.flush()) + self._cutter.flush()
        return self._splitter.push(rest) + self._splitter.flush()

    def whole(self, ids: Iterable[int]) -> str:
        """The text of a whole answer."""
        return self.push(*ids) + self.flush()

    def _push(self, token: int) -> str:
        piece = self._splitter.push(self._cutter.push(self._decoder.push(token)))
        if not self.stopped and None not in self._specials and token in self._specials:
            # A stop string or a character that has begun does not go on beyond a tag.
            piece += self._splitter.push(self._cutter.push(self._decoder.flush()) + self._cutter.flush())
            if token == self._specials[0]:
                self._splitter.enter()
            else:
                self._splitter.leave()
        return piece
