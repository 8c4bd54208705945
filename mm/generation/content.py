"""Media by what is in them: what stands at each position of a prompt, and features kept for the next request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm.datasets.processor import Encoded, EncodedMedia
from mm.types import CrossMedia, Tokens


@dataclass
class Counts:
    """What an engine has done: positions read of prompts, positions found in the cache instead, tokens decoded,
    decoding steps, media that were encoded and media whose features were kept from before."""

    prefilled: int = 0
    shared: int = 0
    decoded: int = 0
    steps: int = 0
    encoded: int = 0
    remembered: int = 0


@dataclass
class Remembered:
    """Features of media by what is in them, the longest unused forgotten first beyond `limit` bytes."""

    limit: int
    device: torch.device
    items: OrderedDict[tuple[str, bytes], Tokens] = field(default_factory=OrderedDict)
    size: int = 0

    def of(self, tower: Any, item: EncodedMedia, counts: Counts) -> Tokens:
        """A medium's features, unpadded; from before where the same was shown before."""
        key = item.kind, digest(item)
        if (known := self.get(key)) is not None:
            counts.remembered += 1
            return known
        alone = Tokens.stack([item.tokens])
        moved = Tokens(*(getattr(alone, name).to(self.device) for name in ("values", "positions", "mask", "grid")))
        out = tower(moved).tokens
        real = out.mask[0]
        tokens = Tokens(out.values[0][real], out.positions[0][real], out.mask[0][real], out.grid[0])
        self.put(key, tokens)
        counts.encoded += 1
        return tokens

    def get(self, key: tuple[str, bytes]) -> Tokens | None:
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: tuple[str, bytes], tokens: Tokens) -> None:
        self.items[key] = tokens
        self.size += _bytes(tokens)
        while self.size > self.limit and len(self.items) > 1:
            self.size -= _bytes(self.items.popitem(last=False)[1])


def identities(encoded: Encoded) -> list[Any]:
    """What stands at each decoder position: a token's id, or which part of which media."""
    slots = {item.column: item for item in encoded.media}
    found: list[Any] = []
    for column, token in enumerate(encoded.ids.tolist()):
        item = slots.get(column)
        if item is None:
            found.append(token)
        else:
            content = digest(item).hex()
            found += [(item.kind, content, part) for part in range(item.length)]
    return found


def digest(item: EncodedMedia) -> bytes:
    """Of what the tower reads: the same content is the same, whatever file it came from."""
    parts = (item.tokens.values, item.tokens.positions, item.tokens.grid)
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(str(tuple(part.shape)).encode())
        whole.update(part.contiguous().numpy().tobytes())
    return whole.digest()


def _bytes(tokens: Tokens) -> int:
    return tokens.values.numel() * tokens.values.element_size()


def beside(rows: list[CrossMedia | None]) -> CrossMedia | None:
    """The media of each row, padded to the longest; a row without any has one that is hidden."""
    if all(row is None for row in rows):
        return None
    some = next(row for row in rows if row is not None)
    longest = max(1 if row is None else row.values.shape[1] for row in rows)

    def padded(name: str) -> Tensor:
        like = getattr(some, name)
        out = like.new_zeros(len(rows), longest, *like.shape[2:])
        for place, row in enumerate(rows):
            if row is not None:
                value = getattr(row, name)[0]
                out[place, : len(value)] = value
        return out

    return CrossMedia(*(padded(name) for name in ("values", "document_ids", "branch_ids", "index")))
