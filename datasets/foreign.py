"""Samples of tars that others wrote with WebDataset: media, captions and metadata by their suffixes.

key.jpg key.txt                 a medium and what the assistant says of it
key.jpg key.json                the caption from the JSON ("caption" or "text"), or its "messages"; the rest is meta
key.0.jpg key.1.wav key.json    several media, in the order of their names
key.jpg key.cls                 a class number, kept in meta
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from mm.datasets.source import SUFFIXES, media_parts
from mm.types import Media, Sample

CAPTIONS = ("caption", "text")


def sample_of_files(key: str, files: dict[str, bytes], where: str) -> Sample:
    """The sample that the files of one key make; `files` by what follows the key and its dot.

    Raises ValueError, beginning with `where`, for text that is no UTF-8, for JSON that is no object, and for a sample
    with neither media nor text.
    """
    media, texts, meta = [], [], {}
    messages: list[dict[str, Any]] | None = None
    for name in sorted(files):
        suffix = PurePath(f"x.{name}").suffix.lower()
        if suffix in SUFFIXES:
            media.append(Media(SUFFIXES[suffix], files[name], name if "." in name else f"{PurePath(key).name}.{name}"))
        elif suffix == ".json":
            meta |= _object(files[name], f"{where}: member '{key}.{name}'")
        elif suffix == ".cls":
            meta["cls"] = _text(files[name], f"{where}: member '{key}.{name}'").strip()
        else:
            texts.append(_text(files[name], f"{where}: member '{key}.{name}'").strip())
    if not texts:
        texts = [meta[name] for name in CAPTIONS if isinstance(meta.get(name), str)][:1]
    if isinstance(meta.get("messages"), list):
        messages = meta.pop("messages")
    if not media and not texts and messages is None:
        raise ValueError(f"{where}: neither media nor text in {', '.join(sorted(files))}")
    if messages is None:
        user = [{"role": "user", "content": media_parts(media)}] if media else []
        messages = [*user, *({"role": "assistant", "content": text} for text in texts[:1])]
    return Sample(key, messages, media, meta=meta)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8 text") from None


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(data, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
