"""Chat -> elements: what stands at every place of a row before the splice.

    messages + branches -> turns -> ids, labels, branch ids, slots

An element is one text token or one slot for a media item. Only structure makes elements: turns come from roles and
slots from media parts. Text is encoded part by part with specials off and is never searched, so a part's tokens depend
on that part alone, and text that spells a special token is ordinary text.

Shape legend: `L` elements of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from mm.datasets.chat_checks import Message, check_prompt, checked_parts, checked_reasoning, checked_role
from mm.types import IGNORE, SLOT_IDS, Sample


class Vocabulary(Protocol):
    """What a template needs of a text tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def special(self, name: str) -> int: ...


class Written(str):
    """Text that a model wrote, with its tokens: the same text encoded may give others, and what was computed of these
    would be of no use. Ordinary text in every other way; no file of data can hold one. `ids` must hold no special."""

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int] = ()) -> Written:
        self = super().__new__(cls, text)
        self.ids = tuple(ids)
        return self


def text_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    """The tokens of a part's text."""
    return list(text.ids) if isinstance(text, Written) else vocabulary.encode(text)


def tag_ids(vocabulary: Vocabulary, tag: str) -> list[int]:
    """The special that a tag around reasoning is, where the vocabulary has it; the tag as text otherwise."""
    try:
        return [vocabulary.special(tag)]
    except ValueError:
        return vocabulary.encode(tag)


@dataclass(frozen=True)
class Style:
    """How a turn looks: special, ordinary text, content, special, ordinary text; `{role}` stands for the role."""

    opening: str
    header: str
    closing: str
    footer: str


STYLES: dict[str, Style] = {
    "chatml": Style(opening="<|im_start|>", header="{role}\n", closing="<|im_end|>", footer="\n"),
    "compact": Style(opening="<|{role}|>", header="", closing="<|end|>", footer=""),
}


@dataclass(frozen=True)
class Slot:
    """The element `column` stands for item `media` of the sample."""

    column: int
    kind: str
    media: int


@dataclass(frozen=True)
class Turn:
    """Elements `start:stop`: one turn, or the piece of it that the common part or a branch holds."""

    role: str
    branch: int
    start: int
    stop: int
    closed: bool


@dataclass
class Elements:
    """A rendered sample.

    ids, labels, branch_ids  (L,) int64, as in Batch (labels are not shifted)
    slots, turns             in the order of their elements
    """

    ids: Tensor
    labels: Tensor
    branch_ids: Tensor
    slots: list[Slot]
    turns: list[Turn]


@dataclass
class _Writer:
    """Elements under construction. A turn opens with its first message and closes when another one begins."""

    vocabulary: Vocabulary
    style: Style
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    branch: int = 0
    role: str | None = None  # of the open turn
    start: int = 0

    def put(self, ids: list[int], supervised: bool = False) -> None:
        self.ids += ids
        self.labels += ids if supervised else [IGNORE] * len(ids)
        self.branches += [self.branch] * len(ids)

    def text(self, text: str, role: str) -> None:
        if text:
            self.put(self.vocabulary.encode(text.format(role=role)))

    def reasoning(self, text: str, tags: tuple[str, str]) -> None:
        """What stands between the tags before an answer, learned with it; an empty block says that there was none, and
        is given."""
        opening, closing = (tag_ids(self.vocabulary, tag) for tag in tags)
        inside, after = (self.vocabulary.encode(piece) for piece in (f"\n{text}\n", "\n\n"))
        self.put([*opening, *inside, *closing, *after], supervised=bool(text))

    def open(self, role: str) -> None:
        self.role, self.start = role, len(self.ids)
        self.put([self.vocabulary.special(self.style.opening.format(role=role))])
        self.text(self.style.header, role)

    def close(self) -> None:
        assert self.role is not None
        self.put([self.vocabulary.special(self.style.closing)], supervised=self.role == "assistant")
        self.text(self.style.footer, self.role)
        self.pause(closed=True)
        self.role = None

    def pause(self, closed: bool = False) -> None:
        """Notes the elements of the open turn so far."""
        assert self.role is not None
        self.turns.append(Turn(self.role, self.branch, self.start, len(self.ids), closed))
        self.start = len(self.ids)


class ChatTemplate:
    """Renders a sample's messages and branches.

    Consecutive messages of one role are one turn. Where a branch goes on with the role that the common part ended with,
    the common part leaves that turn open and the branch continues it: a branch then has exactly the elements that the
    same messages have in a chat of their own.

    Labels stand on what the assistant says and on the special that closes its turn; everything else is IGNORE.
    """

    thinking_tags: ClassVar[tuple[str, str]] = ("<think>", "</think>")  # around reasoning, as most models have them

    def __init__(self, style: Literal["chatml", "compact"] = "compact") -> None:
        if style not in STYLES:
            raise ValueError(f"style={style!r} is not a chat template; use one of {', '.join(STYLES)}")
        self.style = style

    @property
    def end(self) -> str:
        """The special that closes a turn: generation stops at it."""
        return STYLES[self.style].closing

    def stop_ids(self, tokenizer: Vocabulary) -> frozenset[int]:
        """The ids that end an answer."""
        return frozenset({tokenizer.special(self.end)})

    def render(
        self, sample: Sample, tokenizer: Vocabulary, generation_prompt: bool = False, thinking: bool | None = None
    ) -> Elements:
        """The elements of `sample`; `generation_prompt` opens an assistant turn after the last message.

        An answer's `reasoning_content` stands before it, between `thinking_tags`; once a user has spoken again, it is
        left out. `thinking` False opens the turn with an empty block, so that the answer begins at once; here True is
        as None: the model opens the block itself.

        Raises ValueError, naming the sample, for an unknown role or part, a media index without its item, and for a
        generation prompt on a sample that has branches or whose last message is already the assistant's.
        """
        if generation_prompt:
            check_prompt(sample)
        writer = _Writer(tokenizer, STYLES[self.style])
        self._write(writer, sample, sample.messages, ends=not sample.branches)
        if sample.branches:
            self._write_branches(writer, sample)
        elif writer.role is not None:
            writer.close()
        if generation_prompt:
            writer.open("assistant")
            if thinking is False:
                writer.reasoning("", self.thinking_tags)
            writer.pause()
        return Elements(
            torch.tensor(writer.ids, dtype=torch.int64),
            torch.tensor(writer.labels, dtype=torch.int64),
            torch.tensor(writer.branches, dtype=torch.int64),
            writer.slots,
            writer.turns,
        )

    def _write_branches(self, writer: _Writer, sample: Sample) -> None:
        if writer.role is not None:
            if any(branch and branch[0].get("role") == writer.role for branch in sample.branches):
                writer.pause()
            else:
                writer.close()
        common = writer.role
        for number, branch in enumerate(sample.branches, start=1):
            writer.branch, writer.role, writer.start = number, common, len(writer.ids)
            self._write(writer, sample, branch, ends=True)
            if writer.role is not None:
                writer.close()

    def _write(self, writer: _Writer, sample: Sample, messages: list[Message], ends: bool) -> None:
        """`ends`: no other messages follow, so that the reasoning after the last question stays."""
        questions = [place for place, message in enumerate(messages) if message.get("role") == "user"]
        for place, message in enumerate(messages):
            role, reasoning = checked_role(sample, message), checked_reasoning(sample, message)
            if role != writer.role:
                if writer.role is not None:
                    writer.close()
                writer.open(role)
            if reasoning is not None and ends and place > max(questions, default=-1):
                writer.reasoning(reasoning, self.thinking_tags)
            for part in checked_parts(sample, message):
                if part["type"] == "text":
                    writer.put(text_ids(writer.vocabulary, part["text"]), supervised=role == "assistant")
                else:
                    writer.slots.append(Slot(len(writer.ids), part["type"], part["media"]))
                    writer.put([SLOT_IDS[part["type"]]])


def without_answer(sample: Sample) -> Sample:
    """The sample without the assistant messages that end it (and that end its branches): a question to be answered."""
    return replace(
        sample,
        messages=sample.messages if sample.branches else _without_answer(sample.messages),
        branches=[_without_answer(branch) for branch in sample.branches],
    )


def single_branch(sample: Sample, branch: int) -> Sample:
    """The chat that branch `branch` (from 0) of the sample is, without the others; its key is `key/branch`."""
    messages = [*sample.messages, *sample.branches[branch]]
    return replace(sample, key=f"{sample.key}/{branch}", messages=messages, branches=[])


def _without_answer(messages: list[Message]) -> list[Message]:
    kept = len(messages)
    for role, group in groupby(reversed(messages), key=lambda message: message.get("role")):
        kept -= len(list(group)) if role == "assistant" else 0
        break
    return messages[:kept]
