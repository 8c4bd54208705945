"""One request in an engine: what it was asked with, what it holds, and its answer as it comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mm.datasets.processor import Encoded
from mm.generation.caches.paged import Table
from mm.generation.content import identities
from mm.generation.logprobs import TokenLogprob
from mm.generation.rows import Shaper
from mm.generation.speaker import Speaker
from mm.types import CrossMedia
from mm.types import Sequence as DecoderInput

if TYPE_CHECKING:
    from mm.generation.batching import Engine


class Ticket(Iterator[str]):
    """One request in an engine: an iterator of text pieces, whole characters each. Asking for one drives the engine.

    `ids` grow as they come, `logprobs` with them if asked for; `finish_reason` is "stop", "length" or "cancelled" at
    the end, None before. `shared` of the prompt's positions were found in the cache. What failed for this request alone
    is raised here, by its next piece.
    """

    def __init__(self, engine: Engine, encoded: Encoded, name: str, shaper: Shaper, max_new_tokens: int) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if shaper.decoding.logprobs is None else []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.prompt_length, self.shared = encoded.length, 0
        self.engine, self.encoded, self.name, self.shaper = engine, encoded, name, shaper
        self.max_new_tokens = max_new_tokens
        self.table = Table()
        self.identities = identities(encoded)
        self.sequence: DecoderInput | None = None  # of the prompt, until it is read
        self.cross: CrossMedia | None = None
        self.next_position = 0
        self._speaker = Speaker(engine.model, shaper.decoding, shaper.prompts.openings[0])
        self._pieces: deque[str] = deque()

    def __next__(self) -> str:
        while not self._pieces:
            if self.error is not None:
                raise self.error
            if self.finish_reason is not None:
                raise StopIteration
            self.engine.step()
        return self._pieces.popleft()

    def taken(self) -> str:
        """What of the answer has come since it was last asked for. Unlike `next`, this does not drive the engine."""
        pieces = "".join(self._pieces)
        self._pieces.clear()
        return pieces

    @property
    def reasoning(self) -> str | None:
        """What was thought before the answer, so far, which no piece holds; None where nothing was."""
        return self._speaker.reasoning

    def text(self) -> str:
        """The whole answer (what of it no piece has given yet)."""
        return "".join(self)

    def cancel(self) -> None:
        """Ends the request at once, wherever it is, and frees all that it holds. Does nothing to one that has ended."""
        if self.finish_reason is None:
            self.engine.leave(self, "cancelled")

    def take(self, token: int, likely: TokenLogprob | None) -> None:
        """One more token of the answer."""
        stops = self.shaper.stops
        if token not in stops:
            self.ids.append(token)
            if self.logprobs is not None and likely is not None:
                self.logprobs.append(likely)
            self._show(self._speaker.push(token))
        if not self.shaper.going([token]):
            self._end("stop")
        elif len(self.ids) == self.max_new_tokens:
            self._end("length")
        else:
            self.shaper.push(torch.tensor([token], device=self.engine.model.device))
            self.identities.append(token)

    def _end(self, reason: str) -> None:
        self._show(self._speaker.flush())
        self.engine.leave(self, reason)

    def _show(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
