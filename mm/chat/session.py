"""A chat with a model, whatever shows it: the messages so far, their media, and what is attached to the next.

attach, attach, ask -> pieces of the answer; ask -> ...; save, load, reset
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm.datasets.decode import decode
from mm.generation.engine import FinishReason, stream
from mm.generation.requests import GenerativeModel, check_at_least_one
from mm.generation.sampling import Sampler
from mm.types import KINDS, Kind, Media, MediaError, Sample

if TYPE_CHECKING:  # most chats look nothing up
    from mm.tools.index import Hit
    from mm.tools.lookup import Lookup

FORMAT = 1  # of saved chats
SMALLEST_SIDE = 2  # pixels: a 1x1 image is a tracking pixel or a mistake, and any answer about it is made up


@dataclass(frozen=True)
class Settings:
    """How answers are generated; see `mm.generation.engine.stream`. Raises ValueError naming a nonsense setting."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    max_length: int | None = None

    def __post_init__(self) -> None:
        Sampler(self.temperature, self.top_k, self.top_p, self.min_p)
        check_at_least_one(max_new_tokens=self.max_new_tokens, max_length=self.max_length)


@dataclass(frozen=True)
class Statistics:
    """One answer: positions of its prompt, tokens generated, seconds to the first piece and in all. `finish_reason` is
    None for an answer that was stopped."""

    prompt_length: int
    tokens: int
    first_seconds: float
    seconds: float
    finish_reason: FinishReason | None


class ChatSession:
    """A chat: `system`, `messages` and `media` as in a Sample, and `attached`, the media of the next question.

    Each turn's random numbers come from the seed and the number of the turn: the same chat gives the same answers.
    """

    def __init__(self, model: GenerativeModel, settings: Settings | None = None, system: str | None = None) -> None:
        self.model = model
        self.settings = settings or Settings()
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.media: list[Media] = []
        self.attached: list[Media] = []
        self.lookup: Lookup | None = None  # set it, and answers rest on documents
        self.hits: list[Hit] = []  # the documents of the last question
        self.last: Statistics | None = None

    @property
    def turns(self) -> int:
        """Questions answered so far."""
        return len(self.messages) // 2

    @property
    def sources(self) -> str:
        """Which documents the last answer rests on, a line each; "" if it was given none."""
        if self.lookup is None or not self.hits or not self.messages:
            return ""
        return self.lookup.sources(self.messages[-1]["content"], self.hits)

    def attach(self, kind: Kind, path: str | Path) -> int:
        """Opens a file and keeps it for the next question; returns the decoder positions that it will take.

        Raises MediaError naming the file if it cannot be used as this kind, ValueError if the model takes no such kind.
        """
        media = Media(kind, Path(path).expanduser().absolute(), str(path))
        positions = self._measure(media)
        self.attached.append(media)
        return positions

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer to `text` and what is attached, piece by piece.

        The turn joins the chat when the answer ends or, with what there is of it, when it is stopped (closing the
        iterator, Ctrl-C). Until there is a first piece, and after an error, the chat is as before.

        Raises ValueError or MediaError as `stream` does.
        """
        media = self.media + self.attached
        parts = [{"type": item.kind, "media": len(self.media) + i} for i, item in enumerate(self.attached)]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        messages = [*self.messages, question]
        start = time.perf_counter()
        answer = stream(self.model, self._sample(messages, media), **asdict(self.settings))
        pieces: list[str] = []
        first = 0.0
        failed = False
        try:
            for piece in answer:
                first = first or time.perf_counter() - start
                pieces.append(piece)
                yield piece
        except Exception:
            failed = True
            raise
        finally:
            answer.close()
            if not failed and (pieces or answer.finish_reason):
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
                self.media, self.attached = media, []
                seconds = time.perf_counter() - start
                self.last = Statistics(answer.prompt_length, len(answer.ids), first, seconds, answer.finish_reason)

    def reset(self) -> None:
        """Forgets the messages and the media, not the system prompt."""
        self.messages, self.media, self.attached, self.last, self.hits = [], [], [], None, []

    def save(self, path: str | Path) -> None:
        """Writes the chat as JSON; media by their paths. Raises OSError."""
        chat = {
            "format": FORMAT,
            "system": self.system,
            "messages": self.messages,
            "media": [{"kind": item.kind, "path": str(item.data)} for item in self.media],
        }
        final = Path(path).expanduser()
        unfinished = final.with_name(f".{final.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(chat, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(final)

    def load(self, path: str | Path) -> None:
        """Replaces the chat by a saved one. Raises ValueError naming the file, MediaError or OSError; the chat is then
        as before."""
        try:
            chat = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            saved_format, system, messages = chat["format"], chat["system"], chat["messages"]
            media = [Media(item["kind"], Path(item["path"]), str(item["path"])) for item in chat["media"]]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a chat that /save wrote") from error
        if saved_format != FORMAT:
            raise ValueError(f"{path}: a chat of format {saved_format!r}; this program reads format {FORMAT}")
        if not isinstance(system, str | None) or not _are_objects(messages):
            raise ValueError(f"{path}: not a chat that /save wrote")
        self.model.template.render(Sample(str(path), messages, media), self.model.tokenizer)  # checks roles and parts
        for item in media:
            self._measure(item)
        self.reset()
        self.system, self.messages, self.media = system, messages, media

    def _sample(self, messages: list[dict[str, Any]], media: list[Media]) -> Sample:
        system = [{"role": "system", "content": self.system}] if self.system else []
        sample = Sample(f"chat-turn-{self.turns + 1}", [*system, *messages], media)
        if self.lookup is not None:  # for this answer alone: the chat keeps the question as it was asked
            sample, self.hits = self.lookup(self.model, sample)
        return sample

    def _measure(self, media: Media) -> int:
        """Decoder positions of a media item, which is read through: a file's end can be missing too."""
        specs = self.model.media_specs()
        if media.kind not in specs:
            kinds = ", ".join(("text", *(kind for kind in KINDS if kind in specs)))
            raise ValueError(f"{media.name}: this model takes {kinds}; it has no tower for {media.kind}")
        spec = specs[media.kind]
        try:
            decoded = decode(media)
            if isinstance(decoded, Tensor) and min(decoded.shape[1:]) < SMALLEST_SIDE:
                raise MediaError(
                    f"image {media.name!r} has {decoded.shape[2]} x {decoded.shape[1]} pixels: nothing to see"
                )
            spec.tokenizer(decoded)
            return spec.slot_length(spec.tokenizer.measure(decoded))
        except MediaError:
            raise
        except ValueError as error:  # the tokenizer's own complaint does not know the file
            raise MediaError(f"{media.name}: {error}") from error


def _are_objects(messages: Any) -> bool:
    return isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
