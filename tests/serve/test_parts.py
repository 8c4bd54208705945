"""Messages in OpenAI's form become plain ones: parts, system prompts, calls and their results."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mm.serve.forms import ChatForm, Tool, read_form
from mm.serve.limits import MediaLimits, Refused
from mm.serve.media import MediaDecoder
from mm.serve.parts import Opener, text_bytes
from mm.serve.uploads import Uploads
from mm.types import Media

from .files import film, picture, sound

TOOL = {"type": "function", "function": {"name": "now", "description": "the time", "strict": True}}


@pytest.fixture(scope="module")
def uploads() -> Uploads:
    return Uploads(100_000)


@pytest.fixture(scope="module")
def opener(decoder: MediaDecoder, uploads: Uploads) -> Iterator[Opener]:
    with ThreadPoolExecutor(2) as pool:
        yield Opener(decoder, MediaLimits(items=3), uploads, pool)


def plain(opener: Opener, messages: list[Any], tools: list[Any] | None = None) -> list[dict[str, Any]]:
    form = read_form(ChatForm, {"model": "m", "messages": messages, "tools": tools})
    return asyncio.run(opener.messages(form.messages, form.tools or []))


def refused(opener: Opener, messages: list[Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        plain(opener, messages)
    return caught.value


def file(data: bytes) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": base64.b64encode(data).decode()}}


def test_files_are_what_their_first_bytes_say(opener: Opener, uploads: Uploads) -> None:
    stored = uploads.add(sound("OGG"), "a picture.png", "user_data")
    parts = [
        file(picture()),
        {"type": "text", "text": "and"},
        file(film()),
        {"type": "file", "file": {"file_id": stored.id}},
    ]
    [message] = plain(opener, [{"role": "user", "content": parts}])
    assert [part["type"] for part in message["content"]] == ["image", "text", "video", "audio"]
    for part in message["content"]:
        if part["type"] != "text":
            media = part[part["type"]]
            assert isinstance(media, Media) and media.kind == part["type"] and media.tokens is not None
    assert refused(opener, [{"role": "user", "content": [file(b"GIF80a not")]}]).code == "unsupported_media_type"
    assert refused(opener, [{"role": "user", "content": [file(picture())] * 4}]).code == "too_many_items"


def test_tools_are_described_at_the_end_of_the_system_prompt(opener: Opener) -> None:
    user = {"role": "user", "content": "when?"}
    first, second = plain(opener, [user], [TOOL])
    assert first["role"] == "system" and second == user
    assert '{"name": "now", "description": "the time", "parameters": {' in first["content"]
    assert "strict" not in first["content"]
    parts = [{"type": "text", "text": "be brief"}, {"type": "text", "text": "and kind"}]
    [both, _] = plain(opener, [{"role": "developer", "content": parts}, user], [TOOL])
    assert both == {"role": "system", "content": f"be brief\nand kind\n\n{first['content']}"}
    assert plain(opener, [user]) == [user]


def test_calls_and_results_become_turns(opener: Opener) -> None:
    def call(name: str, arguments: str) -> dict[str, Any]:
        return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}

    asked = {"role": "assistant", "content": "well", "tool_calls": [call("a", '{"x": 1}'), call("b", "")]}
    results = [{"role": "tool", "tool_call_id": f"call_{name}", "content": name.upper()} for name in ("b", "a")]
    thought = {"role": "assistant", "content": "done", "reasoning_content": "hm", "refusal": None, "audio": None}
    found = plain(opener, [{"role": "user", "content": "?"}, asked, *results, thought])
    assert [message["role"] for message in found] == ["user", "assistant", "user", "assistant"]
    assert found[1]["content"] == (
        'well\n<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>\n'
        '<tool_call>{"name": "b", "arguments": {}}</tool_call>'
    )
    assert found[2]["content"] == ("<tool_response>\nb: B\n</tool_response>\n<tool_response>\na: A\n</tool_response>")
    assert found[3] == {"role": "assistant", "content": "done", "reasoning_content": "hm"}
    error = refused(opener, [{"role": "assistant", "tool_calls": [call("a", "{")]}])
    assert (error.code, error.param) == ("invalid_value", "messages[0]")
    assert refused(opener, [{"role": "user", "content": "?"}, results[0]]).param == "messages[1]"


def test_all_text_is_counted() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "12345"}}
    messages = [
        {"role": "system", "content": "é"},
        {"role": "user", "content": [{"type": "text", "text": "abc"}, file(b"x" * 30)]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "1234567"},
        {"role": "tool", "tool_call_id": "c", "content": "ab"},
    ]
    form = read_form(ChatForm, {"model": "m", "messages": messages})
    assert text_bytes(form.messages) == 2 + 3 + 5 + 7 + 2


def test_the_oldest_uploads_go_first() -> None:
    uploads = Uploads(10)
    ids = [uploads.add(b"1234", "a", "user_data").id for _ in range(3)]
    assert uploads.get(ids[1]).data == uploads.get(ids[2]).data == b"1234"
    with pytest.raises(Refused, match="file_not_found"):
        uploads.get(ids[0])
    uploads.remove(ids[1])
    with pytest.raises(Refused, match="file_not_found"):
        uploads.remove(ids[1])


def test_a_model_without_media_takes_none() -> None:
    with ThreadPoolExecutor(1) as pool:
        opener = Opener(None, MediaLimits(), Uploads(10), pool)
        assert refused(opener, [{"role": "user", "content": [file(picture())]}]).code == "unsupported_media_type"


def test_a_tool_is_read_as_it_was_declared() -> None:
    assert Tool.model_validate(TOOL).function.parameters == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }
