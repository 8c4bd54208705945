"""A chat as the ecosystem writes it -> Sample: each medium stands in the part that shows it.

    [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "what is it?"}]}]

Content is text or a list of parts. A part of media has its file under its kind or under "path": a path, the file's
bytes, or a Media. "reasoning_content" is what an assistant thought before it spoke. Only these keys are read: nothing in such a chat can name a token or a slot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.datasets.chat_checks import ROLES
from mm.types import KINDS, Kind, Media, Sample


def sample_of_messages(messages: Any, key: str, where: str, folder: Path = Path()) -> Sample:
    """The Sample of a chat; paths are relative to `folder`.

    Raises ValueError, beginning with `where`, for what is no such chat, with the number of the message (from 1). Files
    are not opened here.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ValueError(f"{where}: give a list with at least one message")
    media: list[Media] = []
    turns = [_turn(message, f"{where}, message {place}", folder, media) for place, message in enumerate(messages, 1)]
    return Sample(key, turns, media)


def _turn(message: Any, where: str, folder: Path, media: list[Media]) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f'{where}: "role" must be {", ".join(ROLES[:-1])} or {ROLES[-1]}')
    turn, content = {"role": message["role"]}, message.get("content")
    if isinstance(message.get("reasoning_content"), str):
        turn["reasoning_content"] = message["reasoning_content"]
    if isinstance(content, str):
        return turn | {"content": content}
    if not isinstance(content, list):
        raise ValueError(f'{where}: "content" must be text or a list of parts')
    return turn | {"content": [_part(part, where, folder, media) for part in content]}


def _part(part: Any, where: str, folder: Path, media: list[Media]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in KINDS and (kind in part) != ("path" in part):
        item = _medium(kind, part.get(kind, part.get("path")), len(media) + 1, folder)
        if item is not None:
            media.append(item)
            return {"type": kind, "media": len(media) - 1}
    shown = json.dumps(part, default=repr, skipkeys=True)[:80]
    raise ValueError(
        f'{where}: {shown} is no part; give {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}} (or '
        'audio, video; "path" says the same) with a path, bytes or a Media of that kind'
    )


def _medium(kind: Kind, value: Any, number: int, folder: Path) -> Media | None:
    if isinstance(value, Media):
        return value if value.kind == kind else None
    if isinstance(value, bytes):
        return Media(kind, value, f"{kind} {number}")
    return Media(kind, folder / value, str(value)) if isinstance(value, str | Path) and str(value) else None
