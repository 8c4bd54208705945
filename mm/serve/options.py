"""The options of a request's form -> those of `mm.generation.options.Decoding`, and tickets of an engine."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from mm.generation.requests import ContextTooLong
from mm.generation.tickets import Ticket
from mm.serve.forms import ChatForm, Sampling
from mm.serve.limits import Refused, ServeLimits
from mm.serve.toolcalls import forced_schema, offered

T = TypeVar("T")
COLDEST = 1e-5  # below this temperature logits overflow, and the likeliest token is as good as certain
_SAME = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def sampling(form: Sampling) -> dict[str, Any]:
    """What is not given is OpenAI's default: temperature 1."""
    temperature = 1.0 if form.temperature is None else form.temperature
    options: dict[str, Any] = {"temperature": temperature if temperature >= COLDEST else 0.0}
    options |= {name: value for name in _SAME if (value := getattr(form, name)) is not None}
    if form.top_p == 1.0:
        del options["top_p"]  # all of them
    if form.stop:
        options["stop_strings"] = [form.stop] if isinstance(form.stop, str) else form.stop
    if form.stream_options is not None and not form.stream:
        raise Refused("invalid_value", "stream_options without stream", "stream_options")
    return options


def chat_options(form: ChatForm, limits: ServeLimits) -> dict[str, Any]:
    """Raises Refused for combinations that make no sense."""
    options = sampling(form)
    if form.top_logprobs is not None and not form.logprobs:
        raise Refused("invalid_value", "top_logprobs without logprobs", "top_logprobs")
    if form.logprobs:
        options["logprobs"] = form.top_logprobs or 0
    options |= {name: value for name in ("thinking", "thinking_budget") if (value := getattr(form, name)) is not None}
    if form.max_tokens is not None and form.max_completion_tokens is not None:
        raise Refused("invalid_value", "max_tokens and max_completion_tokens are the same", "max_tokens")
    schema, forced = _schema(form), forced_schema(offered(form.tools, form.tool_choice), form.tool_choice)
    if schema is not None and forced is not None:
        raise Refused("invalid_value", "response_format and a tool_choice that must call", "response_format")
    if schema is not None or forced is not None:
        wanted = forced if schema is None else schema
        if (size := len(json.dumps(wanted))) > limits.schema_bytes:
            raise Refused("invalid_schema", f"{size:,} bytes of schema, more than {limits.schema_bytes:,}")
        options["json_schema"] = wanted
    return options


def _schema(form: ChatForm) -> dict[str, Any] | None:
    wanted = form.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise Refused("missing_parameter", "response_format of type json_schema without json_schema", "response_format")
    return wanted.json_schema.schema_


def seeds(form: Sampling, limits: ServeLimits) -> list[int]:
    """One for each choice: drawn, if the request names none."""
    count = form.n or 1
    if count > limits.choices:
        raise Refused("invalid_value", f"n={count}, more than {limits.choices}", "n")
    first = secrets.randbits(63) if form.seed is None else form.seed
    return [first + number for number in range(count)]


def prepared(make: Callable[..., Ticket], limits: ServeLimits, tokens: int | None, **options: Any) -> Ticket:
    """A ticket whose answer has `tokens`, or what there is room for, at most `answer_tokens`. Raises Refused."""
    ticket = told(make, max_new_tokens=tokens or 1, max_length=limits.max_length, **options)
    if tokens is None:
        ticket.max_new_tokens = min(limits.answer_tokens, limits.max_length - ticket.prompt_length)
    return ticket


def told(work: Callable[..., T], *args: Any, **options: Any) -> T:
    """What `work` gives; what it says of a request that makes no sense becomes Refused."""
    prompt = "prompt" if "ids" in options else "messages"
    try:
        return work(*args, **options)
    except ContextTooLong as error:
        raise Refused("context_length_exceeded", str(error), prompt) from None
    except ValueError as error:
        schema = str(error).startswith("json_schema") or str(error).startswith("the form cannot be followed")
        raise Refused("invalid_schema" if schema else "invalid_value", str(error)) from None
