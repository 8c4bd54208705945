"""What answers look like on the wire: token probabilities, usage, and events of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from mm.generation.logprobs import TokenLogprob
from mm.generation.tickets import Ticket
from mm.serve.errors import error_body
from mm.serve.guard import log_refused
from mm.serve.limits import Refused
from mm.serve.metrics import Metrics
from mm.tokenizers.text import TextTokenizer

LOWEST = -9999.0  # JSON has no infinity; OpenAI's own servers say this


def token_entry(tokenizer: TextTokenizer, likely: TokenLogprob) -> dict[str, Any]:
    """A token of a chat's `logprobs`."""
    alternatives = [_token(tokenizer, token, value) for token, value in likely.top]
    return {**_token(tokenizer, likely.id, likely.logprob), "top_logprobs": alternatives}


def token_text(tokenizer: TextTokenizer, token: int) -> str:
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def token_bytes(tokenizer: TextTokenizer, token: int) -> bytes:
    """The bytes of a token; of a row of the output that only pads the vocabulary, its number."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else f"<{token}>".encode()


def _token(tokenizer: TextTokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(tokenizer, token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}


def usage(tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Positions of the prompt, which the choices share, and tokens of all answers."""
    prompt, answers = tickets[0].prompt_length, sum(len(ticket.ids) for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": tickets[0].shared},
    }


class EventStream(StreamingResponse):
    """Server-sent events of JSON objects, ended by [DONE]; what goes wrong midway is an event of its own."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], request_id: str, metrics: Metrics) -> None:
        super().__init__(self._events(chunks, request_id, metrics))
        self.headers["X-Accel-Buffering"] = "no"  # proxies pass each event on at once

    async def _events(
        self, chunks: AsyncIterator[dict[str, Any]], request_id: str, metrics: Metrics
    ) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except Refused as refused:
            log_refused(refused, request_id)
            metrics.refused(refused.code)
            yield _event(error_body(refused, request_id))
        yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
