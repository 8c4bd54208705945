"""POST /v1/embeddings and POST /v1/explain."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mm.datasets.messages import sample_of_messages
from mm.explain.collect import ROLLOUT_LONGEST, explain
from mm.explain.page import render
from mm.model import MultimodalModel
from mm.serve.forms import EmbeddingForm, ExplainForm, Part, TextPart
from mm.serve.limits import Refused
from mm.serve.options import told
from mm.tools.embeddings import TextEmbedder
from mm.types import Media, Tokens

if TYPE_CHECKING:
    from mm.serve.app import Server

INPUTS = 256  # of one request for embeddings
EXPLAINED = 48  # tokens of an answer that is explained
LONGEST_TOKEN = 16  # characters, of tokens that are common: more of a long answer need not be encoded


async def embed(server: Server, request: Request) -> Response:
    """Vectors of texts and media in the space that the alignment tower gives them both."""
    form = await server.form(EmbeddingForm, request)
    head = server.model.embedding_head
    if head is None:
        raise Refused("not_supported", "the model has no alignment tower: embedding_dim is not set")
    dim = head.text.out_features
    if form.dimensions not in (None, dim):
        raise Refused("invalid_value", f"vectors have {dim} numbers", "dimensions")
    items = [form.input] if isinstance(form.input, str) else form.input
    if len(items) > INPUTS:
        raise Refused("too_many_items", f"{len(items)} inputs", "input")
    server.take_place(request)
    texts, media = await _read(server, items)
    embedder = TextEmbedder(server.model, "tower", max_tokens=server.limits.max_length)
    lengths = await server.in_thread(lambda: [len(server.model.tokenizer.encode(text)) for text in texts.values()])
    if 0 in lengths:
        raise Refused("invalid_value", "an empty text", "input")
    if max(lengths, default=0) > server.limits.max_length:
        raise Refused("context_length_exceeded", f"a text of {max(lengths)} tokens", "input")
    vectors: dict[int, np.ndarray] = {}
    if texts:
        found = await server.worker.call(lambda: embedder(list(texts.values())))
        vectors |= dict(zip(texts, found, strict=True))
    for place, item in media.items():
        vectors[place] = await server.worker.call(lambda item=item: embed_media(server.model, item))
    data = [
        {"object": "embedding", "index": place, "embedding": _coded(vectors[place], form.encoding_format)}
        for place in range(len(items))
    ]
    used = {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    return JSONResponse({"object": "list", "data": data, "model": server.name, "usage": used})


async def _read(server: Server, items: Sequence[str | Part]) -> tuple[dict[int, str], dict[int, Media]]:
    """Texts and media by their places."""
    texts: dict[int, str] = {}
    media: dict[int, Media] = {}
    for place, item in enumerate(items):
        if isinstance(item, str | TextPart):
            texts[place] = item if isinstance(item, str) else item.text
        else:
            if len(media) == server.media_limits.items:
                raise Refused("too_many_items", "too many media", "input")
            media[place] = await server.opener.open(item)
    if sum(len(text.encode()) for text in texts.values()) > server.limits.text_bytes:
        raise Refused("context_length_exceeded", "more text than text_bytes", "input")
    return texts, media


@torch.inference_mode()
def embed_media(model: MultimodalModel, media: Media) -> np.ndarray:
    """(E,) float32, unit length."""
    assert model.embedding_head is not None and media.tokens is not None
    alone = Tokens.stack([media.tokens])
    fields = (getattr(alone, name).to(model.device) for name in ("values", "positions", "mask", "grid"))
    return model.embedding_head.embed_media(model.tower(media.kind)(Tokens(*fields)))[0].cpu().numpy()


def _coded(vector: np.ndarray, encoding: str) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


async def explained(server: Server, request: Request) -> Response:
    """The page that shows where an answer looked."""
    form = await server.form(ExplainForm, request)
    server.take_place(request)
    messages = await server.messages(form.messages, [])
    sample = await server.in_thread(told, sample_of_messages, messages, "chat", "messages")
    named = [replace(item, name=f"{item.kind} {number}") for number, item in enumerate(sample.media, 1)]
    sample = replace(sample, media=named)
    prepare = server.worker.engine.prepare
    longest = min(ROLLOUT_LONGEST, server.limits.max_length)
    await server.in_thread(
        lambda: told(prepare, sample=sample, max_new_tokens=EXPLAINED, max_length=longest)
    )  # checks the chat, and that it is not too long
    tokenizer = server.model.tokenizer
    answer = form.answer
    if answer is not None:
        ids = await server.in_thread(tokenizer.encode, answer[: LONGEST_TOKEN * EXPLAINED])
        answer = tokenizer.decode(ids[:EXPLAINED]) or None
    found = await server.worker.call(
        lambda: told(explain, server.model, sample, max_new_tokens=EXPLAINED, answer=answer)
    )
    return JSONResponse({"html": await server.in_thread(render, found, server.name)})
