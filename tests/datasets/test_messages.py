"""Chats as the ecosystem writes them, made samples: the forms that are taken, and what is said of all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm.datasets.chat_template import ChatTemplate
from mm.datasets.messages import sample_of_messages
from mm.testing import picture, tiny_tokenizer
from mm.types import Media


def read(*content: Any, **options: Any) -> Any:
    return sample_of_messages([{"role": "user", "content": list(content)}], "k", "chat", **options)


def test_text_and_roles() -> None:
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
    chat += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": [{"type": "text", "text": "why?"}]}]
    sample = sample_of_messages(chat, "k", "chat")
    assert (sample.key, sample.messages, sample.media, sample.branches) == ("k", chat, [], [])


def test_media_in_every_form(tmp_path: Path) -> None:
    given = picture(1)
    assert isinstance(given.data, bytes)
    sample = read(
        {"type": "image", "image": "a.png"},
        {"type": "audio", "path": "b.wav"},
        {"type": "video", "video": tmp_path / "c.mp4"},
        {"type": "image", "image": given.data},
        {"type": "image", "path": given},
        {"type": "text", "text": "?"},
        folder=tmp_path,
    )
    assert sample.media == [
        Media("image", tmp_path / "a.png", "a.png"),
        Media("audio", tmp_path / "b.wav", "b.wav"),
        Media("video", tmp_path / "c.mp4", str(tmp_path / "c.mp4")),
        Media("image", given.data, "image 4"),
        given,
    ]
    parts = sample.messages[0]["content"]
    assert [(part["type"], part.get("media")) for part in parts[:5]] == [
        ("image", 0), ("audio", 1), ("video", 2), ("image", 3), ("image", 4),
    ]  # fmt: skip


def test_nothing_but_the_known_keys_gets_in() -> None:
    sample = read({"type": "text", "text": "a", "ids": [1], "media": 0})
    assert sample.messages[0]["content"] == [{"type": "text", "text": "a"}]
    tokenizer = tiny_tokenizer()
    spelled = sample_of_messages([{"role": "user", "content": "<|end|><image>"}], "k", "chat")
    ids = ChatTemplate("compact").render(spelled, tokenizer).ids.tolist()
    assert ids.count(tokenizer.special("<|end|>")) == 1 and min(ids) >= 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "^chat: give a list with at least one message"),
        ("hi", "at least one message"),
        ({"role": "user", "content": "hi"}, "at least one message"),
        (["hi"], 'chat, message 1: "role" must be system, user or assistant'),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], 'chat, message 2: "role"'),
        ([{"role": "user"}], 'message 1: "content" must be text or a list of parts'),
        ([{"role": "user", "content": [{"type": "image"}]}], r'\{"type": "image"\} is no part'),
        ([{"role": "user", "content": [{"type": "image", "media": 0}]}], "is no part"),
        ([{"role": "user", "content": [{"type": "image", "image": "a", "path": "b"}]}], "is no part"),
        ([{"role": "user", "content": [{"type": "audio", "image": "a.png"}]}], "is no part"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], "is no part"),
        ([{"role": "user", "content": [{"type": "image", "image": ""}]}], "is no part"),
        ([{"role": "user", "content": [{"type": "audio", "audio": picture(0)}]}], "is no part.*Media of that kind"),
        ([{"role": "user", "content": ["hi"]}], '"hi" is no part'),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "is no part"),
    ],
)
def test_what_is_no_chat_is_named(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        sample_of_messages(messages, "k", "chat")
    assert len(str(error.value)) < 400


def test_json_lines_and_python_say_the_same() -> None:
    part = {"type": "image", "image": "a.png"}
    assert read(json.loads(json.dumps(part))).media == read(part).media
