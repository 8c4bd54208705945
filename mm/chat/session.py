"""A chat with a model, whatever shows it: the messages so far, their media, and what is attached to the next.

attach, attach, ask -> pieces of the answer; ask -> ...; save, load, reset
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm.chat.turn import Statistics, Turn
from mm.datasets.chat_template import Written
from mm.datasets.decode import decode
from mm.generation.batching import Engine, Ticket, not_paged
from mm.generation.engine import Stream, stream
from mm.generation.requests import GenerativeModel, check_at_least_one
from mm.generation.sampling import Sampler
from mm.types import KINDS, Kind, Media, MediaError, Sample

if TYPE_CHECKING:  # most chats have no tools
    from mm.tools.calls import ToolCall
    from mm.tools.choose import Tools
    from mm.tools.index import Hit
    from mm.tools.toolbox import Result

FORMAT = 1  # of saved chats
SMALLEST_SIDE = 2  # pixels: a 1x1 image is a tracking pixel or a mistake, and any answer about it is made up


@dataclass(frozen=True)
class Settings:
    """How answers are generated; see `mm.generation.engine.generate`. Raises ValueError naming a nonsense setting."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    max_length: int | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        Sampler(self.temperature, self.top_k, self.top_p, self.min_p)
        check_at_least_one(max_new_tokens=self.max_new_tokens, max_length=self.max_length)


class ChatSession:
    """A chat: `system`, `messages` and `media` as in a Sample, and `attached`, the media of the next question.

    Each turn's random numbers come from the seed and the number of the turn: the same chat gives the same answers.

    Turns are decoded on one Engine, which keeps what it has computed: a turn reads what is new in it, and each medium
    is encoded once. An answer stays in the chat in the very tokens that the model wrote. For a model that no Engine
    takes, `rereads` says why each turn reads the whole chat anew.
    """

    def __init__(self, model: GenerativeModel, settings: Settings | None = None, system: str | None = None) -> None:
        self.model = model
        self.settings = settings or Settings()
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.media: list[Media] = []
        self.attached: list[Media] = []
        self.tools: Tools | None = None  # set it, and answers rest on documents, or on what tools say
        self.hits: list[Hit] = []  # the documents of the last question
        self.steps: list[tuple[ToolCall, Result]] = []  # what its answer called
        self.last: Statistics | None = None
        self.engine: Engine | None = None  # made by the first question
        self.rereads = not_paged(model)

    @property
    def turns(self) -> int:
        """Questions answered so far."""
        return sum(message["role"] == "user" and not message.get("from_tools") for message in self.messages)

    @property
    def sources(self) -> str:
        """Which documents the last answer rests on, a line each; "" if it was given none."""
        if self.tools is None or not self.hits or not self.messages:
            return ""
        return self.tools.sources(self.messages[-1]["content"], self.hits)

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

        Raises ValueError or MediaError as `mm.generation.engine.generate` does.
        """
        media = self.media + self.attached
        parts = [{"type": item.kind, "media": len(self.media) + i} for i, item in enumerate(self.attached)]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        messages = [*self.messages, question]
        sample = self._sample(messages, media)
        turn = Turn(self, sample)
        failed = False
        try:
            for part in turn.parts():
                if isinstance(part, str):
                    turn.pieces.append(part)
                    yield part
                else:  # what tools were asked, and said
                    messages += [part.messages[0], {**part.messages[1], "from_tools": True}]
                    turn.pieces.clear()
        except Exception:
            failed = True
            raise
        finally:
            turn.end()
            answer, pieces = turn.answer, turn.pieces
            if not failed and answer is not None and (pieces or turn.reason):
                said = self._written("".join(pieces), answer.ids)
                # Kept for whoever reads the chat: templates leave out what was thought before an earlier answer.
                thought = {} if answer.reasoning is None else {"reasoning_content": answer.reasoning}
                self.messages = [*messages, {"role": "assistant", "content": said, **thought}]
                self.media, self.attached = media, []
                self.last = turn.statistics(answer)

    def begin(self, sample: Sample) -> Ticket | Stream:
        options = asdict(self.settings)
        if self.rereads:
            return stream(self.model, sample, **options)
        if self.engine is None or self.engine.running or self.engine.waiting:
            # One request at a time, so pages can be as small as they get: a turn then shares all that went before.
            self.engine = Engine(self.model, pages=None, page_size=1, max_rows=1)
        return self.engine.submit(sample, **options)

    def free(self, answer: Ticket | Stream) -> int:
        """Frees what an answer holds, however it has ended; returns how much of its prompt was known before."""
        if isinstance(answer, Stream):
            answer.close()
            return 0
        answer.cancel()
        if self.engine is not None and not self.engine.pages.sound:
            self.engine = None  # Ctrl-C came in the middle of the bookkeeping: start over rather than guess
        return answer.shared

    def _written(self, text: str, ids: Sequence[int]) -> str:
        """An answer as the chat keeps it: in the tokens that the model wrote, but for specials, which are structure and
        not for the model to make, and where they spell what was shown (not in a character that was cut through)."""
        tokenizer = self.model.tokenizer
        specials = set(tokenizer.specials.values())
        plain = [token for token in ids if token not in specials]
        return Written(text, plain) if tokenizer.decode(plain) == text else text

    def reset(self) -> None:
        """Forgets the messages and the media, not the system prompt."""
        self.messages, self.media, self.attached, self.last = [], [], [], None
        self.hits, self.steps = [], []

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
        return Sample(f"chat-turn-{self.turns + 1}", [*system, *messages], media)

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
