"""What a chat must be before a template writes it: each check names the sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mm.types import KINDS, Sample

ROLES: tuple[str, ...] = ("system", "user", "assistant")
Message = dict[str, Any]


def check_prompt(sample: Sample) -> None:
    """Raises ValueError, naming the sample, unless an answer can follow it."""
    if sample.branches:
        raise ValueError(f"sample {sample.key}: a generation prompt needs one chat, not branches; use single_branch()")
    if sample.messages and sample.messages[-1].get("role") == "assistant":
        raise ValueError(
            f"sample {sample.key}: the last message is the assistant's, so the prompt would hold its own answer; "
            "remove it with without_answer()"
        )


def checked_role(sample: Sample, message: Message) -> str:
    """The message's role. Raises ValueError, naming the sample, for an unknown one."""
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"sample {sample.key}: role {role!r} is not one of {', '.join(ROLES)}")
    return role


def checked_reasoning(sample: Sample, message: Message) -> str | None:
    """What an assistant's message says that it thought. Raises ValueError, naming the sample, for anything but text,
    and for the reasoning of others."""
    reasoning = message.get("reasoning_content")
    if reasoning is not None and (not isinstance(reasoning, str) or message.get("role") != "assistant"):
        raise ValueError(
            f"sample {sample.key}: reasoning_content is text of an assistant's message; here it is {reasoning!r}, the "
            f"{message.get('role')}'s"
        )
    return reasoning


def checked_parts(sample: Sample, message: Message) -> Iterator[Message]:
    """The parts of a message, each checked: {"type": "text", "text": str} or {"type": kind, "media": index}."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Iterable):
        raise ValueError(f"sample {sample.key}: content {content!r} is neither text nor a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in KINDS:
            _check_media(sample, part)
        elif kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"sample {sample.key}: {part!r} is not a part: give text, {', '.join(KINDS)}")
        yield part


def _check_media(sample: Sample, part: Message) -> None:
    kind, index = part["type"], part.get("media")
    if not isinstance(index, int) or not 0 <= index < len(sample.media):
        raise ValueError(
            f"sample {sample.key}: {kind} part names media {index!r}, but it has {len(sample.media)} items"
        )
    if sample.media[index].kind != kind:
        raise ValueError(f"sample {sample.key}: {kind} part names media {index}, which is {sample.media[index].kind}")
