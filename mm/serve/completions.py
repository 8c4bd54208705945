"""POST /v1/completions: text that goes on, with the log probabilities of both if asked for."""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mm.generation.logprobs import TokenLogprob, text_likelihoods
from mm.generation.tickets import Ticket
from mm.serve.forms import CompletionForm
from mm.serve.limits import Refused
from mm.serve.options import prepared, sampling, seeds, told
from mm.serve.wire import LOWEST, EventStream, token_bytes, token_text
from mm.serve.worker import Answers
from mm.tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    from mm.serve.app import Server

PROMPTS = 64  # in one request, each counted as often as it is answered
DEFAULT_TOKENS = 16  # of an answer, as OpenAI has it


async def complete(server: Server, request: Request) -> Response:
    form = await server.form(CompletionForm, request)
    options, own_seeds = sampling(form), seeds(form, server.limits)
    tokens = DEFAULT_TOKENS if form.max_tokens is None else form.max_tokens
    if form.logprobs is not None:
        options["logprobs"] = form.logprobs
    if not tokens and (form.stream or not form.echo):
        raise Refused("invalid_value", "max_tokens=0 gives nothing but an echo", "max_tokens")
    server.take_place(request)
    prompts = await server.in_thread(_prompts, form.prompt, server)
    if len(prompts) * len(own_seeds) > PROMPTS:
        raise Refused("too_many_items", f"{len(own_seeds)} answers to each of {len(prompts)} prompts", "n")

    def prepare() -> list[Ticket]:
        make = server.worker.engine.prepare_ids
        return [
            prepared(make, server.limits, tokens or 1, ids=ids, seed=seed, **options)
            for ids in prompts
            for seed in own_seeds
        ]

    tickets = await server.in_thread(prepare)  # which also checks the prompts of a mere echo
    echoes = [_Echo(server.model.tokenizer, ids if form.echo else []) for ids in prompts]
    if form.echo and form.logprobs is not None:
        for echo, ids in zip(echoes, prompts, strict=True):
            work = lambda ids=ids: text_likelihoods(server.model, ids, form.logprobs or 0)  # noqa: E731
            echo.logprobs = await server.worker.call(work)
    about = {
        "id": f"cmpl-{request.state.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": server.name,
    }
    reply = _Reply(server, form, about, [echo for echo in echoes for _ in own_seeds], sum(map(len, prompts)))
    if not tokens:
        return JSONResponse(reply.only_echoes())
    answers = server.begin(request, tickets)
    if form.stream:
        return EventStream(reply.chunks(answers), request.state.request_id, server.metrics)
    return JSONResponse(await reply.whole(answers))


def _prompts(prompt: Any, server: Server) -> list[list[int]]:
    """Texts, or ids, one or many -> ids. Special tokens in a text are text."""
    many = prompt if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)) else [prompt]
    if not 0 < len(many) <= PROMPTS:
        raise Refused("too_many_items" if many else "invalid_value", f"{len(many)} prompts", "prompt")
    texts = [each for each in many if isinstance(each, str)]
    if sum(len(text.encode()) for text in texts) > server.limits.text_bytes:
        raise Refused("context_length_exceeded", "more text than text_bytes", "prompt")
    encode = server.model.tokenizer.encode
    return [told(encode, each) if isinstance(each, str) else each for each in many]


class _Echo:
    """A prompt as an answer repeats it; `text` is "" where it does not. `logprobs` are of all its tokens but the
    first."""

    def __init__(self, tokenizer: TextTokenizer, ids: list[int]) -> None:
        self.ids, self.text = ids, tokenizer.decode(ids, skip_specials=False) if ids else ""
        self.logprobs: list[TokenLogprob] = []


class _Offsets:
    """Where in a text each of its tokens begins, in characters: of one that several tokens spell, at the first."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def push(self, data: bytes) -> int:
        at = self._at
        self._at += len(self._utf8.decode(data))
        return at


class _Reply:
    def __init__(
        self, server: Server, form: CompletionForm, about: dict[str, Any], echoes: Sequence[_Echo], read: int
    ) -> None:
        self._server, self._form, self._about, self._echoes, self._read = server, form, about, echoes, read
        self._offsets = [_Offsets() for _ in echoes]

    def only_echoes(self) -> dict[str, Any]:
        choices = [self._choice(index, echo.text, [], "length") for index, echo in enumerate(self._echoes)]
        return {**self._about, "choices": choices, "usage": self._usage([])}

    async def whole(self, answers: Answers) -> dict[str, Any]:
        texts = [[echo.text] for echo in self._echoes]
        async for index, piece in self._server.pieces(answers):
            if piece is not None:
                texts[index].append(piece.text)
        choices = [
            self._choice(index, "".join(texts[index]), ticket.logprobs or [], ticket.finish_reason)
            for index, ticket in enumerate(answers.tickets)
        ]
        return {**self._about, "choices": choices, "usage": self._usage(answers.tickets)}

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        options = self._form.stream_options
        begun = [False] * len(self._echoes)
        async for index, piece in self._server.pieces(answers):
            text = "" if begun[index] else self._echoes[index].text
            first, begun[index] = not begun[index], True
            if piece is None:
                reason = answers.tickets[index].finish_reason
                yield {**self._about, "choices": [self._choice(index, text, [], reason, first)]}
                continue
            choice = self._choice(index, text + piece.text, piece.logprobs, None, first)
            yield {**self._about, "choices": [choice]}
        if options is not None and options.include_usage:
            yield {**self._about, "choices": [], "usage": self._usage(answers.tickets)}

    def _choice(
        self, index: int, text: str, logprobs: list[TokenLogprob], reason: str | None, with_echo: bool = True
    ) -> dict[str, Any]:
        likely = None if self._form.logprobs is None else self._logprobs(index, logprobs, with_echo)
        return {"index": index, "text": text, "logprobs": likely, "finish_reason": reason}

    def _logprobs(self, index: int, logprobs: list[TokenLogprob], with_echo: bool) -> dict[str, Any]:
        tokenizer, echo = self._server.model.tokenizer, self._echoes[index]
        first = echo.ids[:1] if with_echo else []  # nothing before it says how likely it was
        entries = [*(echo.logprobs if with_echo else []), *logprobs]
        spelled = [token_bytes(tokenizer, token) for token in [*first, *(entry.id for entry in entries)]]
        top = [
            {token_text(token_bytes(tokenizer, token)): max(value, LOWEST) for token, value in entry.top}
            for entry in entries
        ]
        return {
            "tokens": [token_text(data) for data in spelled],
            "token_logprobs": [*([None] * len(first)), *(max(entry.logprob, LOWEST) for entry in entries)],
            "top_logprobs": [*([None] * len(first)), *top] if self._form.logprobs else None,
            "text_offset": [self._offsets[index].push(data) for data in spelled],
        }

    def _usage(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Each prompt counts once, however many answers it has."""
        written = sum(len(ticket.ids) for ticket in tickets)
        return {
            "prompt_tokens": self._read,
            "completion_tokens": written,
            "total_tokens": self._read + written,
            "prompt_tokens_details": {"cached_tokens": sum(each.shared for each in tickets[:: self._form.n or 1])},
        }
