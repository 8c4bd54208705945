"""The server: one model, its engine in a thread of its own, and the routes of OpenAI's API over it.

guard -> route -> form -> media (threads, child processes) -> tickets -> worker (the model's thread) -> answer
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from mm.generation.batching import Engine
from mm.generation.tickets import Ticket
from mm.model import MultimodalModel
from mm.serve.body import parse_json
from mm.serve.chat import chat
from mm.serve.completions import complete
from mm.serve.errors import error_response
from mm.serve.fetch import INTERNET, Network
from mm.serve.formats import FORMATS
from mm.serve.forms import Form, Message, Tool, read_form
from mm.serve.guard import Guard, log_refused
from mm.serve.limits import MediaLimits, Refused, ServeLimits
from mm.serve.media import MediaDecoder
from mm.serve.metrics import Metrics
from mm.serve.other import embed, explained
from mm.serve.parts import Opener, text_bytes
from mm.serve.places import Places
from mm.serve.uploads import Uploads, upload
from mm.serve.worker import Answers, Piece, Worker
from mm.types import KINDS, Kind

T = TypeVar("T")
F = TypeVar("F", bound=Form)
PAGE = Path(__file__).parent / "page"
PAGE_SIZE = 16  # positions
OPENED = 8  # media at a time, of which two are decoded and the others fetched
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """`app` is the ASGI application; `close` ends the model's thread and the decoders.

    Args:
        model: in eval mode, with a tokenizer, and a cache that can be paged
        name: what requests call it
        limits, media: what clients may ask for
        api_key: which every request must give; without one, only names of this machine are answered for
        hosts: more names that it answers for without a key
        network: how media are fetched from the hosts that `media` allows

    Raises ValueError for a model that cannot be served, RuntimeError where media cannot be decoded safely.
    """

    def __init__(
        self,
        model: MultimodalModel,
        name: str = "model",
        limits: ServeLimits | None = None,
        media: MediaLimits | None = None,
        api_key: str | None = None,
        hosts: tuple[str, ...] = (),
        network: Network = INTERNET,
    ) -> None:
        if not model.tokenizer.has_text:
            raise ValueError("this model came without a tokenizer, so it cannot be talked with")
        self.model, self.name, self.started = model, name, int(time.time())
        self.limits, self.media_limits = limits or ServeLimits(), media or MediaLimits()
        self.worker = Worker(self._engine)
        specs = model.media_specs()
        self.decoder = MediaDecoder(specs, self.media_limits) if specs else None
        self.places, self.uploads = Places(self.limits), Uploads(self.limits.upload_bytes)
        self._pool = ThreadPoolExecutor(self.limits.slots, "mm-requests")
        self._media_pool = ThreadPoolExecutor(OPENED, "mm-media")  # apart: chats without media need not wait for them
        self.opener = Opener(self.decoder, self.media_limits, self.uploads, self._media_pool, network)
        self.metrics = Metrics(lambda: self.worker.engine, lambda: self.places.used)
        routes = _routes(self)
        self.app = Guard(routes, self.limits, self.media_limits, self.metrics, api_key, hosts)

    def _engine(self) -> Engine:
        pages = -(-self.limits.cache_tokens // PAGE_SIZE)
        return Engine(self.model, pages, PAGE_SIZE, max_rows=self.limits.slots * self.limits.choices)

    def wait(self) -> None:
        """Returns when media can be decoded; RuntimeError, saying why, where they cannot."""
        if self.decoder is not None:
            self.decoder.wait()

    def close(self) -> None:
        self.worker.close()
        if self.decoder is not None:
            self.decoder.close()
        for pool in (self._pool, self._media_pool):
            pool.shutdown(cancel_futures=True)

    # What routes are made of.

    async def form(self, form: type[F], request: Request) -> F:
        """The request's body. Raises Refused, also where it names another model."""

        def parsed() -> F:  # the text is dropped as soon as it is read: it may be as large as all that is in it
            return read_form(form, parse_json(request.scope["state"].pop("body"), self.media_limits))

        read = await self.in_thread(parsed)
        self.check_name(getattr(read, "model", self.name))
        return read

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise Refused("model_not_found", f"{name[:80]!r} is not {self.name!r}", "model")

    def take_place(self, request: Request) -> None:
        """Takes one until the request has ended, however it does. Raises Refused where there is none."""
        request.state.exits.enter_context(self.places.taken(request.state.client))

    async def messages(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """The chat as plain messages, its media decoded. Raises Refused."""
        if len(messages) > self.limits.max_length:  # each takes a position at least
            raise Refused("context_length_exceeded", f"{len(messages):,} messages", "messages")
        if (size := text_bytes(messages, tools)) > self.limits.text_bytes:
            raise Refused("context_length_exceeded", f"{size:,} bytes of text", "messages")
        return await self.opener.messages(messages, tools)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def begin(self, request: Request, tickets: Sequence[Ticket]) -> Answers:
        """Answers that end with the request, however it does."""
        answers = self.worker.begin(tickets, request.state.deadline)
        request.state.exits.callback(answers.close)
        return answers

    async def pieces(self, answers: Answers) -> AsyncIterator[tuple[int, Piece | None]]:
        start, first = time.perf_counter(), True
        async for index, piece in answers:
            if first:
                self.metrics.first_token(time.perf_counter() - start)
                first = False
            yield index, piece

    def settings(self) -> dict[str, Any]:
        """What the page needs to know."""
        specs, media = self.model.media_specs(), self.media_limits
        kinds: list[Kind] = [kind for kind in KINDS if kind in specs]
        tags = self.model.template.thinking_tags
        return {
            "model": self.name,
            "kinds": kinds,
            "formats": {kind: FORMATS[kind] for kind in kinds},
            "max_length": self.limits.max_length,
            "answer_tokens": self.limits.answer_tokens,
            "limits": {f"{kind}_bytes": media.bytes_of(kind) for kind in kinds}
            | {name: getattr(media, name) for name in ("items", "body_bytes", "image_side", "audio_seconds")},
            "thinking": all(tag in self.model.tokenizer.specials for tag in tags),
            "embeddings": self.model.embedding_head is not None,
        }

    def described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "mm"}


def _routes(server: Server) -> FastAPI:
    app = FastAPI(title="mm", openapi_url=None, redirect_slashes=False)

    def route(path: str, work: Callable[[Server, Request], Any], method: str = "POST") -> None:
        async def endpoint(request: Request) -> Response:
            return await work(server, request)

        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    route("/v1/chat/completions", chat)
    route("/v1/completions", complete)
    route("/v1/embeddings", embed)
    route("/v1/explain", explained)
    route("/v1/files", upload)
    route("/v1/files/{file_id}", _file, "GET")
    route("/v1/files/{file_id}", _delete_file, "DELETE")
    route("/v1/models", _models, "GET")
    route("/v1/models/{name:path}", _model, "GET")
    route("/v1/settings", _settings, "GET")
    route("/health", _health, "GET")
    route("/metrics", _metrics, "GET")
    route("/", _page, "GET")
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))

    async def refuse(request: Request, error: Exception) -> Response:
        refused = _as_refused(error)
        log_refused(refused, request.state.request_id)
        server.metrics.refused(refused.code)
        return error_response(refused, request.state.request_id)

    for kind in (Refused, HTTPException, Exception):  # the guard logs what is unexpected
        app.add_exception_handler(kind, refuse)
    return app


def _as_refused(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        return Refused("not_found" if error.status_code == 404 else "method_not_allowed", str(error.detail))
    if isinstance(error, HTTPException):  # a form that is none
        return Refused("invalid_value", str(error.detail))
    return Refused("internal_error", f"{type(error).__name__}: {error}")


async def _file(server: Server, request: Request) -> Response:
    return JSONResponse(server.uploads.get(request.path_params["file_id"]).to_openai())


async def _delete_file(server: Server, request: Request) -> Response:
    file_id = request.path_params["file_id"]
    server.uploads.remove(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def _models(server: Server, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [server.described()]})


async def _model(server: Server, request: Request) -> Response:
    server.check_name(request.path_params["name"])
    return JSONResponse(server.described())


async def _settings(server: Server, request: Request) -> Response:
    return JSONResponse(server.settings())


async def _health(server: Server, request: Request) -> Response:
    if not server.worker.alive:
        raise Refused("shutting_down", "the worker has ended")
    return JSONResponse({"status": "ok"})


async def _metrics(server: Server, request: Request) -> Response:
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


async def _page(server: Server, request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})
