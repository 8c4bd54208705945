"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mm.datasets.messages import sample_of_messages
from mm.generation.tickets import Ticket
from mm.serve.forms import ChatForm
from mm.serve.options import chat_options, prepared, seeds, told
from mm.serve.toolcalls import offered
from mm.serve.wire import EventStream, token_entry, usage
from mm.serve.worker import Answers, Piece
from mm.tools.held import CallFilter

if TYPE_CHECKING:
    from mm.serve.app import Server


async def chat(server: Server, request: Request) -> Response:
    form = await server.form(ChatForm, request)
    options, own_seeds = chat_options(form, server.limits), seeds(form, server.limits)
    tools = offered(form.tools, form.tool_choice)
    server.take_place(request)
    messages = await server.messages(form.messages, tools)
    sample = await server.in_thread(told, sample_of_messages, messages, "chat", "messages")
    tokens = form.max_completion_tokens or form.max_tokens

    def prepare() -> list[Ticket]:
        make = server.worker.engine.prepare
        return [prepared(make, server.limits, tokens, sample=sample, seed=seed, **options) for seed in own_seeds]

    answers = server.begin(request, await server.in_thread(prepare))
    reply = _Reply(server, form, answers, [tool.function.name for tool in tools], request.state.request_id)
    if form.stream:
        include_usage = form.stream_options is not None and form.stream_options.include_usage
        return EventStream(reply.chunks(include_usage), request.state.request_id, server.metrics)
    return JSONResponse(await reply.whole())


class _Reply:
    """The answers to one request, in either form."""

    def __init__(self, server: Server, form: ChatForm, answers: Answers, tools: list[str], request_id: str) -> None:
        self._server, self._form, self._answers = server, form, answers
        self._filters = [CallFilter(tools) for _ in answers.tickets]
        self._about = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": server.name}

    async def whole(self) -> dict[str, Any]:
        tickets = self._answers.tickets
        texts, thoughts = [[""] for _ in tickets], [[""] for _ in tickets]
        async for index, piece in self._server.pieces(self._answers):
            if piece is not None:
                texts[index].append(self._filters[index].push(piece.text))
                thoughts[index].append(piece.reasoning)
        choices: list[dict[str, Any]] = []
        for index, ticket in enumerate(tickets):
            rest, calls = self._filters[index].end()
            text, thought = "".join(texts[index]) + rest, "".join(thoughts[index])
            message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
            message["refusal"] = None
            if thought:
                message["reasoning_content"] = thought
            if calls:
                message["tool_calls"] = [call.to_openai() for call in calls]
            likely = None if ticket.logprobs is None else self._logprobs(ticket.logprobs)
            reason = "tool_calls" if calls else ticket.finish_reason
            choices.append({"index": index, "message": message, "logprobs": likely, "finish_reason": reason})
        return {**self._about, "object": "chat.completion", "choices": choices, "usage": usage(tickets)}

    async def chunks(self, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        tickets = self._answers.tickets
        nothing = {"usage": None} if include_usage else {}
        for index in range(len(tickets)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None}) | nothing
        async for index, piece in self._server.pieces(self._answers):
            if piece is None:
                rest, calls = self._filters[index].end()
                if rest:
                    yield self._chunk(index, {"content": rest}) | nothing
                if calls:
                    called = [{"index": place, **call.to_openai()} for place, call in enumerate(calls)]
                    yield self._chunk(index, {"tool_calls": called}) | nothing
                reason = "tool_calls" if calls else tickets[index].finish_reason
                yield self._chunk(index, {}, reason) | nothing
            elif delta := self._delta(index, piece):
                yield self._chunk(index, delta, logprobs=piece.logprobs) | nothing
            elif piece.logprobs:
                yield self._chunk(index, {"content": ""}, logprobs=piece.logprobs) | nothing
        if include_usage:
            yield {**self._about, "object": "chat.completion.chunk", "choices": [], "usage": usage(tickets)}

    def _delta(self, index: int, piece: Piece) -> dict[str, str]:
        text = self._filters[index].push(piece.text)
        found = {"content": text, "reasoning_content": piece.reasoning}
        return {name: value for name, value in found.items() if value}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        likely = self._logprobs(logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": likely, "finish_reason": reason}
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, logprobs: Any) -> dict[str, Any]:
        tokenizer = self._server.model.tokenizer
        return {"content": [token_entry(tokenizer, likely) for likely in logprobs], "refusal": None}
