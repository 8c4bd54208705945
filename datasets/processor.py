"""Sample -> Encoded: ids, labels and media tokens, cut to a length by whole turns, branches and media.

    render -> decode media, measure -> leave out what does not fit -> tokenise the media that stay

Lengths count decoder positions after the splice: a text token takes one, a slot takes what its MediaSpec states.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mm.datasets.chat_template import ChatTemplate, Elements, Slot, Turn, Vocabulary
from mm.datasets.decode import Resizer, decode
from mm.datasets.features import Precomputed, Stored
from mm.types import Media, MediaSpec, Sample, Tokens


@dataclass
class EncodedMedia:
    """One media item of a sample: it fills the slot at element `column` with `length` decoder positions.

    `read` is how many tokens the encoder reads of it. `encoded`: it has, and `tokens` are its features, from a shard.
    """

    kind: str
    tokens: Tokens
    column: int
    length: int
    name: str
    read: int
    encoded: bool = False


@dataclass
class Encoded:
    """A sample ready to be packed.

    ids, labels, branch_ids  (L,) int64, as in Batch
    length                   decoder positions after the splice
    dropped                  what was left out to fit: "branches", "turns", "media"
    opened                   elements at the end that open the assistant's turn (of a generation prompt)
    fits                     False if `length` exceeds the processor's max_length although all that may go has gone
    """

    sample: Sample
    ids: Tensor
    labels: Tensor
    branch_ids: Tensor
    media: list[EncodedMedia]
    length: int
    dropped: Counter[str] = field(default_factory=Counter)
    fits: bool = True
    opened: int = 0

    @property
    def media_tokens(self) -> int:
        """What the encoders read: tokens of all media, before any bridge."""
        return sum(item.read for item in self.media)


class NoTower(ValueError):
    """The data has a kind of media that the model does not take: the config is wrong, not the sample."""


class _Remembering:
    """A vocabulary that remembers short texts: headers, system prompts and short answers come again and again."""

    def __init__(self, vocabulary: Vocabulary, entries: int = 10_000, characters: int = 200) -> None:
        self.vocabulary, self.entries, self.characters = vocabulary, entries, characters
        self.special = vocabulary.special
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if len(text) > self.characters:
            return self.vocabulary.encode(text)
        if text not in self.known:
            if len(self.known) == self.entries:
                self.known.clear()
            self.known[text] = self.vocabulary.encode(text)
        return self.known[text]


class _Kept:
    """Tokens of media files by what is in them, until `limit` bytes are held: what came first stays, so that a data set
    larger than that has a share of its files here in every epoch, and not each for a moment."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.tokens: dict[bytes, Tokens] = {}

    def key(self, media: Media) -> bytes | None:
        if not self.limit or not isinstance(media.data, bytes):
            return None
        return hashlib.blake2b(media.data, digest_size=16, person=media.kind.encode()).digest()

    def add(self, key: bytes, tokens: Tokens) -> None:
        size = sum(getattr(tokens, field.name).nbytes for field in fields(tokens))
        if key not in self.tokens and self.held + size <= self.limit:
            self.tokens[key], self.held = tokens, self.held + size


class Processor:
    """Encodes samples for one model. Pure: the same sample gives the same tensors.

    Of the kinds in `features`, the features that samples bring stand for their media, which are not decoded.
    `keep_bytes` of media tokens are kept: a file that comes again, in a later epoch, is not decoded again.

    A sample longer than `max_length` (decoder positions; None: no limit) loses, in this order and until it fits,

    1. whole branches, the last first, down to one;
    2. whole turns: in training the last, such that what stays ends with an answer; before generation the oldest, such
       that system turns and the last question stay;
    3. whole media, the last first, down to one.

    Never part of a turn or of a media item.
    """

    def __init__(
        self,
        tokenizer: Vocabulary,
        template: ChatTemplate,
        specs: Mapping[str, MediaSpec],
        max_length: int | None = None,
        features: Mapping[str, Stored] | None = None,
        keep_bytes: int = 0,
    ) -> None:
        self.kept = _Kept(keep_bytes)
        self.tokenizer = _Remembering(tokenizer)
        self.template = template
        self.specs = dict(specs)
        self.max_length = max_length
        self.features = dict(features or {})

    def encode(self, sample: Sample, generation_prompt: bool = False, thinking: bool | None = None) -> Encoded:
        """`generation_prompt` and `thinking` are those of `ChatTemplate.render`.

        Raises MediaError for media that cannot be read, and ValueError, naming the sample, for one that the template
        refuses, a kind of media that the model does not take (NoTower), and a generation prompt that does not fit.
        """
        elements = self.template.render(sample, self.tokenizer, generation_prompt, thinking)
        last = elements.turns[-1] if elements.turns else None
        opened = len(elements.ids) - last.start if generation_prompt and last is not None and not last.closed else 0
        decoded = self._decode(sample, elements.slots)
        slot_lengths = [self._slot_length(slot, decoded) for slot in elements.slots]
        dropped = Counter[str]()
        if self.max_length is not None and _length(elements, slot_lengths) > self.max_length:
            elements, slot_lengths, dropped = _truncate(elements, slot_lengths, self.max_length, generation_prompt)
        length = _length(elements, slot_lengths)
        fits = self.max_length is None or length <= self.max_length
        if generation_prompt and not fits:
            raise ValueError(
                f"sample {sample.key}: the last question alone takes {length} positions, more than the "
                f"{self.max_length} that fit; shorten it or raise the maximal length"
            )
        media = [
            self._medium(slot, slot_length, decoded[slot.media], sample)
            for slot, slot_length in zip(elements.slots, slot_lengths, strict=True)
            if fits
        ]
        return Encoded(sample, elements.ids, elements.labels, elements.branch_ids, media, length, dropped, fits, opened)

    def _decode(self, sample: Sample, slots: list[Slot]) -> dict[int, Any]:
        """Index -> decoded media, each item once however many slots show it; or its tokens or features, if it brought
        them."""
        for slot in slots:
            if slot.kind not in self.specs:
                raise NoTower(
                    f"sample {sample.key}: {sample.media[slot.media].name} is {slot.kind}, but the model takes "
                    f"{', '.join(self.specs) or 'text only'}; add a tower for it"
                )
        return {index: self._decode_one(sample, index) for index in dict.fromkeys(slot.media for slot in slots)}

    def _decode_one(self, sample: Sample, index: int) -> Any:
        media: Media = sample.media[index]
        if media.kind in self.features:
            where = f"sample {sample.key}: {media.name}"
            return self.features[media.kind].read(media.features, self.specs[media.kind], where)
        if media.tokens is not None:
            return media.tokens
        key = self.kept.key(media)
        if key is not None and key in self.kept.tokens:
            return self.kept.tokens[key]
        tokenizer: Any = self.specs[media.kind].tokenizer
        resizer: Resizer | None = tokenizer if hasattr(tokenizer, "resize") else None
        return decode(media, resizer=resizer)

    def _slot_length(self, slot: Slot, decoded: dict[int, Any]) -> int:
        spec, item = self.specs[slot.kind], decoded[slot.media]
        if isinstance(item, Precomputed):
            return spec.slot_length(item.grid)
        if isinstance(item, Tokens):
            t, h, w = item.grid.tolist()
            return spec.slot_length((t, h, w))
        return spec.slot_length(spec.tokenizer.measure(item))

    def _medium(self, slot: Slot, length: int, item: Any, sample: Sample) -> EncodedMedia:
        media = sample.media[slot.media]
        name = f"{sample.key}: {media.name}"
        if isinstance(item, Precomputed):
            return EncodedMedia(slot.kind, item.tokens, slot.column, length, name, math.prod(item.grid), encoded=True)
        tokens = self._tokens(item, media)
        return EncodedMedia(slot.kind, tokens, slot.column, length, name, len(tokens))

    def _tokens(self, item: Any, media: Media) -> Tokens:
        if isinstance(item, Tokens):
            return item
        tokens: Tokens = self.specs[media.kind].tokenizer(item)
        if (key := self.kept.key(media)) is not None:
            self.kept.add(key, tokens)
        return tokens


def _length(elements: Elements, slot_lengths: list[int]) -> int:
    return len(elements.ids) - len(slot_lengths) + sum(slot_lengths)


def _truncate(
    elements: Elements, slot_lengths: list[int], limit: int, generation_prompt: bool
) -> tuple[Elements, list[int], Counter[str]]:
    """What stays of the elements and of their slots' lengths, and how many branches, turns and media do not."""
    lengths = torch.ones_like(elements.ids)
    lengths[[slot.column for slot in elements.slots]] = torch.tensor(slot_lengths, dtype=torch.int64)
    keep, dropped = torch.ones_like(lengths, dtype=torch.bool), Counter[str]()

    branch_lengths = torch.bincount(elements.branch_ids, lengths).long()
    if len(branch_lengths) > 2:
        fitting = int((branch_lengths.cumsum(0)[1:] <= limit).sum())
        last = max(fitting, 1)
        keep &= elements.branch_ids <= last
        dropped["branches"] = len(branch_lengths) - 1 - last

    turns = [turn for turn in elements.turns if keep[turn.start]]
    gone = _oldest_turns if generation_prompt else _latest_turns
    for turn in gone(turns, lengths, int(lengths[keep].sum()) - limit):
        keep[turn.start : turn.stop] = False
        dropped["turns"] += 1

    slots = [slot for slot in elements.slots if keep[slot.column]]
    while len(slots) > 1 and int(lengths[keep].sum()) > limit:
        keep[slots.pop().column] = False
        dropped["media"] += 1
    kept_lengths = [n for slot, n in zip(elements.slots, slot_lengths, strict=True) if keep[slot.column]]
    return _select(elements, keep), kept_lengths, +dropped


def _select(elements: Elements, keep: Tensor) -> Elements:
    """The elements where `keep` (L,) is True; turns, of no use after the cut, are left out."""
    columns = (keep.cumsum(0) - 1).tolist()
    slots = [replace(slot, column=columns[slot.column]) for slot in elements.slots if keep[slot.column]]
    return Elements(elements.ids[keep], elements.labels[keep], elements.branch_ids[keep], slots, turns=[])


def _latest_turns(turns: list[Turn], lengths: Tensor, excess: int) -> list[Turn]:
    """The fewest last turns that take `excess` positions and leave an answer at the end; the first answer stays."""
    answers = [i + 1 for i, turn in enumerate(turns) if turn.role == "assistant" and turn.closed]
    cut = len(turns)
    for end in reversed(answers):
        if sum(_size(turn, lengths) for turn in turns[cut:]) >= excess:
            break
        cut = end
    return turns[cut:]


def _oldest_turns(turns: list[Turn], lengths: Tensor, excess: int) -> list[Turn]:
    """The fewest first turns, system turns aside, that take at least `excess` positions; the last question stays."""
    gone: list[Turn] = []
    for turn in (turn for turn in turns[:-2] if turn.role != "system"):
        opens_exchange = turn.role == "user"
        if opens_exchange and sum(_size(t, lengths) for t in gone) >= excess:
            break
        gone.append(turn)
    return gone


def _size(turn: Turn, lengths: Tensor) -> int:
    return int(lengths[turn.start : turn.stop].sum())
