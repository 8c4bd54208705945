"""Messages in OpenAI's form -> messages as `mm.datasets.messages` reads them, their media decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from mm.serve.body import decode_base64
from mm.serve.fetch import INTERNET, Network, fetch
from mm.serve.formats import FORMATS, format_of
from mm.serve.forms import (
    AssistantMessage,
    AudioPart,
    FilePart,
    ImagePart,
    Message,
    Part,
    SoundPart,
    SystemMessage,
    TextPart,
    Tool,
    ToolMessage,
    UserMessage,
    VideoPart,
)
from mm.serve.limits import MediaLimits, Refused, check_items
from mm.serve.media import MediaDecoder
from mm.serve.uploads import Uploads
from mm.tools.calls import ToolCall, describe, from_openai, result_message
from mm.types import Kind, Media


class Opener:
    """Opens the media of requests, in the threads of `pool`. Without a decoder (the model takes no media) each is
    refused."""

    def __init__(
        self,
        decoder: MediaDecoder | None,
        limits: MediaLimits,
        uploads: Uploads,
        pool: Executor,
        network: Network = INTERNET,
    ) -> None:
        self._decoder, self._limits, self._uploads, self._pool, self._network = decoder, limits, uploads, pool, network

    async def messages(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[dict[str, Any]]:
        """Plain messages; each medium is opened once the whole chat is known to be sound. Raises Refused."""
        parts = [part for message in messages if isinstance(message, UserMessage) for part in _parts(message.content)]
        media = [part for part in parts if not isinstance(part, TextPart)]
        check_items(len(media), self._limits)
        opened = dict(zip(map(id, media), await self._open_all(media), strict=True))
        plain: list[dict[str, Any]] = []
        called: dict[str, ToolCall] = {}
        for place, message in enumerate(messages):
            if isinstance(message, ToolMessage):
                call = called.get(message.tool_call_id)
                if call is None:
                    raise Refused("invalid_value", "tool_call_id of no call before it", f"messages[{place}]")
                result = result_message(call, _text(message.content))
                if place and isinstance(messages[place - 1], ToolMessage):  # of one turn
                    plain[-1]["content"] += "\n" + result["content"]
                else:
                    plain.append(result)
            elif isinstance(message, AssistantMessage):
                calls = _calls(message, place)
                called |= {call.id: call for call in calls}
                plain.append(_answer(message, calls))
            elif isinstance(message, SystemMessage):
                plain.append({"role": "system", "content": _text(message.content)})
            else:
                plain.append({"role": "user", "content": _content(message.content, opened)})
        return _with_tools(plain, tools)

    async def open(self, part: Part) -> Media:
        """The medium of a part. Raises Refused."""
        [media] = await self._open_all([part])
        return media

    async def _open_all(self, parts: Sequence[Part]) -> list[Media]:
        loop = asyncio.get_running_loop()
        ready = [(part, self._stored(part)) for part in parts]
        opening = [loop.run_in_executor(self._pool, self._open, *each) for each in ready]
        try:
            return await asyncio.gather(*opening)
        finally:  # once one is refused, or the client has gone, those that have not begun never do
            for each in opening:
                each.cancel()

    def _stored(self, part: Part) -> bytes | None:
        if isinstance(part, FilePart) and part.file.file_id is not None:
            return self._uploads.get(part.file.file_id).data
        return None

    def _open(self, part: Part, stored: bytes | None) -> Media:
        """In a thread: names are resolved, hosts answer, files are decoded."""
        if self._decoder is None:
            raise Refused("unsupported_media_type", "the model takes text alone")
        match part:
            case ImagePart():
                return self._fetched("image", part.image_url.url)
            case AudioPart():
                return self._fetched("audio", part.audio_url.url)
            case VideoPart():
                return self._fetched("video", part.video_url.url)
            case SoundPart():
                data = decode_base64(part.input_audio.data, self._limits.bytes_of("audio"))
                return self._decoder.open("audio", data)
            case FilePart():
                data = self._file(part) if stored is None else stored
                return self._decoder.open(_kind_of(data), data)
            case TextPart():
                raise Refused("invalid_value", "a text where a medium is needed", "input")

    def _fetched(self, kind: Kind, url: str) -> Media:
        assert self._decoder is not None
        return self._decoder.open(kind, fetch(url, self._limits, kind, self._network))

    def _file(self, part: FilePart) -> bytes:
        given = part.file.file_data
        if given is None:
            raise Refused("missing_parameter", "a file part without file_data or file_id", "messages")
        if given[:5].lower() == "data:":
            return fetch(given, self._limits, None, self._network)
        return decode_base64(given, self._limits.bytes_of(None))


def text_bytes(messages: Iterable[Message], tools: Iterable[Tool] = ()) -> int:
    """Bytes of all text that the model is to read."""
    total = sum(len(tool.model_dump_json().encode()) for tool in tools)
    for message in messages:
        for part in _parts(message.content or ""):
            total += len(part.text.encode()) if isinstance(part, TextPart) else 0
        if isinstance(message, AssistantMessage):
            total += sum(len(call.function.arguments.encode()) for call in message.tool_calls or ())
            total += len((message.reasoning_content or "").encode())
    return total


def _parts(content: str | Sequence[Part]) -> Sequence[Part]:
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _content(content: str | Sequence[Part], opened: dict[int, Media]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    plain: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, TextPart):
            plain.append({"type": "text", "text": part.text})
        else:
            media = opened[id(part)]
            plain.append({"type": media.kind, media.kind: media})
    return plain


def _calls(message: AssistantMessage, place: int) -> list[ToolCall]:
    try:
        return from_openai([call.model_dump(include={"id", "function"}) for call in message.tool_calls or ()])
    except ValueError as error:
        raise Refused("invalid_value", str(error), f"messages[{place}]") from None


def _answer(message: AssistantMessage, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """An answer from before, its calls written as the model is asked to write them."""
    text = "\n".join([*filter(None, [_text(message.content or "")]), *(call.to_text() for call in calls)])
    thought = {} if message.reasoning_content is None else {"reasoning_content": message.reasoning_content}
    return {"role": "assistant", "content": text, **thought}


def _with_tools(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The chat with its tools described at the end of the system prompt."""
    if not tools:
        return messages
    text = describe([tool.model_dump(exclude={"function": {"strict"}}) for tool in tools])
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _kind_of(data: bytes) -> Kind:
    name = format_of(data)
    kinds: tuple[Kind, ...] = ("image", "video", "audio")  # MP4 and WebM are taken for videos
    for kind in kinds:
        if name in FORMATS[kind]:
            return kind
    raise Refused("unsupported_media_type", f"a file of {name or 'an unknown format'}")
