"""Controls: the same questions with nothing to see, and with somebody else's media.

A score says something about media only as far as it stands above both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm.types import Media, Sample


def question_only(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without their media: slots are taken out of the messages, and the text stays as it was."""
    return [_without_media(sample) for sample in samples]


def _without_media(sample: Sample) -> Sample:
    messages = []
    for message in sample.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [part for part in content if part["type"] == "text"]
        if content:
            messages.append({**message, "content": content})
    return replace(sample, messages=messages, media=[])


def shuffled_media(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The samples, each with the media of another one: never its own, though a picture that looks alike may come.

    Media go round among samples with the same kinds in the same order (one image; two images; ...). Samples whose media
    nobody else can take are left out, so the result may be shorter. Depends on `seed` and the samples alone.
    """
    rng = random.Random(seed)
    by_kinds: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.media:
            by_kinds.setdefault(tuple(item.kind for item in sample.media), []).append(index)
    swapped: dict[int, list[Media]] = {}
    for indices in by_kinds.values():
        for taker, giver in _rotation([samples[i].media for i in indices], rng):
            swapped[indices[taker]] = samples[indices[giver]].media
    return [replace(sample, media=swapped[i]) for i, sample in enumerate(samples) if i in swapped]


def _rotation(owned: Sequence[list[Media]], rng: random.Random) -> list[tuple[int, int]]:
    """(taker, giver) pairs such that nobody gets what it owns.

    Owners of the same media stand together in a ring, which turns by the size of the largest group: that carries every
    place out of its group, provided the largest is no more than half of the ring. Else its surplus stays out.
    """
    groups: dict[Any, list[int]] = {}
    for index, media in enumerate(owned):
        groups.setdefault(tuple((item.kind, item.data) for item in media), []).append(index)
    blocks = list(groups.values())
    for block in blocks:
        rng.shuffle(block)
    rng.shuffle(blocks)
    largest = max(blocks, key=len)
    del largest[sum(map(len, blocks)) - len(largest) :]
    ring = [index for block in blocks for index in block]
    return [(taker, ring[(place + len(largest)) % len(ring)]) for place, taker in enumerate(ring)]
