"""OpenAI's own client of a server under test, and what the model itself says to the same chat."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

import mm.serve.chat
from mm.datasets.messages import sample_of_messages
from mm.generation import generate
from mm.generation.engine import Generation
from mm.model import MultimodalModel
from mm.serve.run import Running


def client(here: Running, **options: Any) -> OpenAI:
    """Which asks once: a refusal is seen at once."""
    return OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, **options)


def async_client(here: Running) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0)


def said(model: MultimodalModel, messages: Any, tokens: int = 16, **options: Any) -> Generation:
    """By the model without a server; `messages` are a text, or as `mm.datasets.messages` reads them."""
    chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return generate(model, [sample_of_messages(chat, "chat", "test")], tokens, **options)[0]


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def always_say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Lets the model say nothing else to any chat: as whoever has learned it would, token by token."""
    options = mm.serve.chat.chat_options
    monkeypatch.setattr(
        mm.serve.chat,
        "chat_options",
        lambda *given: {**options(*given), "regex": re.escape(text), "json_schema": None},
    )
