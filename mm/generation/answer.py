"""What `model.generate` does: ids in, ids out; a chat in, the text of its answer out."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from mm.datasets.messages import sample_of_messages
from mm.generation.engine import generate, generate_ids
from mm.generation.options import Options
from mm.generation.requests import GenerativeModel


def generate_either(
    model: GenerativeModel, input_ids: Tensor | None, attention_mask: Tensor | None, messages: Any, **options: Any
) -> Tensor | str:
    """`generate_ids` or `answer`. Raises ValueError unless exactly one of `input_ids` and `messages` is given."""
    if (input_ids is None) == (messages is None):
        given = "neither" if messages is None else "both"
        raise ValueError(f"generate takes input_ids or messages, one of the two; {given} given")
    if input_ids is not None:
        return generate_ids(model, input_ids, attention_mask, **options)
    for name, value in {"attention_mask": attention_mask, **options}.items():
        if name in ("attention_mask", "stop", "pad_id") and value is not None:
            raise ValueError(f"{name} goes with input_ids; a chat has none (stop_strings end its answer)")
    return answer(model, messages, **options)


def answer(
    model: GenerativeModel,
    messages: Any,
    max_new_tokens: int = 32,
    seed: int = 0,
    max_length: int | None = None,
    **options: Unpack[Options],
) -> str:
    """The text of the answer to one chat, ready to be appended as the assistant's message.

    `messages` as in `mm.datasets.messages`; arguments, options and errors as in `mm.generation.generate`, which also
    says why an answer ended and how likely its tokens were, and takes many chats.
    """
    if options.get("logprobs") is not None:
        raise ValueError("logprobs: a chat's answer is text alone; use mm.generation.generate, whose answers have them")
    sample = sample_of_messages(messages, "chat", "messages")
    (found,) = generate(model, [sample], max_new_tokens, seed, max_length=max_length, **options)
    return found.text
