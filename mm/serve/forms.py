"""The requests that are understood, field by field, as OpenAI's API defines them; fields that are ours are marked.

Fields that change nothing in an answer (user, metadata, ...) are taken and left; any other that is not here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mm.serve.limits import Refused

F = TypeVar("F", bound="Form")
Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
V = TypeVar("V")
Many = Annotated[list[V], Field(fail_fast=True)]  # of a hundred thousand mistakes the first is enough
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Stop = Annotated[str, Field(max_length=1_000)]
_PARAM = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Url(Form):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Sound(Form):
    data: str
    format: Literal["wav", "mp3"]


class Upload(Form):
    """`file_data` is a data: URL, or base64 alone."""

    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class TextPart(Form):
    type: Literal["text"]
    text: str


class ImagePart(Form):
    type: Literal["image_url"]
    image_url: Url


class SoundPart(Form):
    type: Literal["input_audio"]
    input_audio: Sound


class AudioPart(Form):  # as other servers of open models have it
    type: Literal["audio_url"]
    audio_url: Url


class VideoPart(Form):  # as other servers of open models have it
    type: Literal["video_url"]
    video_url: Url


class FilePart(Form):
    type: Literal["file"]
    file: Upload


Part = Annotated[
    TextPart | ImagePart | SoundPart | AudioPart | VideoPart | FilePart,
    Field(discriminator="type"),
]
Text = str | Many[TextPart]


class CalledFunction(Form):
    name: Name
    arguments: str
    parsed_arguments: Any = None  # OpenAI's client sends back what it made of them


class Call(Form):
    id: str
    index: int | None = None  # of a stream
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Form):
    role: Literal["system", "developer"]
    content: Text
    name: str | None = None


class UserMessage(Form):
    role: Literal["user"]
    content: str | Many[Part]
    name: str | None = None


class AssistantMessage(Form):
    role: Literal["assistant"]
    content: Text | None = None
    tool_calls: list[Call] | None = None
    reasoning_content: str | None = None  # ours, as answers have it
    refusal: str | None = None
    name: str | None = None
    # What clients send back of an answer as they got it, or made of it.
    parsed: Any = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Form):
    role: Literal["tool"]
    content: Text
    tool_call_id: str


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class Function(Form):
    name: Name
    description: str = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    strict: bool | None = None


class Tool(Form):
    type: Literal["function"]
    function: Function


class Named(Form):
    name: str


class NamedTool(Form):
    type: Literal["function"]
    function: Named


class JsonSchema(Form):
    name: str = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Form):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Form):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(Form):
    """What chats and completions have in common. `top_k`, `min_p` and `repetition_penalty` are ours."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class ChatForm(Sampling):
    """`thinking` and `thinking_budget` are ours."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class CompletionForm(Sampling):
    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingForm(Form):
    """An item of `input` that is a part of media is ours: its vector lies in the same space as those of texts."""

    model: str
    input: str | Annotated[list[str | Part], Field(min_length=1, fail_fast=True)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class ExplainForm(Form):
    """Ours: what the page shows of an answer. Without `answer`, of the model's own."""

    model: str
    messages: Messages
    answer: str | None = None


def read_form(form: type[F], value: Any) -> F:
    """Raises Refused: missing_parameter, unknown_parameter or invalid_value, with the parameter's name."""
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}.get(
            first["type"], "invalid_value"
        )
        raise Refused(code, f"{_path(first['loc'])}: {first['msg']}", _param(first["loc"])) from None


def _path(location: Sequence[int | str]) -> str:
    return ".".join(str(step) for step in location)


def _param(location: Sequence[int | str]) -> str | None:
    """The parameter at the top, and its item if it is a list: as much as is the same in every form."""
    if not location or not isinstance(location[0], str) or not _PARAM.fullmatch(location[0]):
        return None
    index = f"[{location[1]}]" if len(location) > 1 and isinstance(location[1], int) else ""
    return location[0] + index
