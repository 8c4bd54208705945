"""Every class of error that OpenAI's client knows, with its code and the request's id; and what a key opens."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from mm.model import MultimodalModel
from mm.serve.limits import CODES, Refused, ServeLimits
from mm.serve.run import Running, running
from mm.testing import tiny_decoder, tiny_model, tiny_tokenizer

from .attack import within
from .clients import client, user

NAME, KEY = "tiny", "a key"
LIMITS = ServeLimits(slots=3, per_client=2, max_length=600, cache_tokens=2400, deadline_seconds=30)
ENDLESS: Any = {  # no answer to it ends soon
    "messages": user("?"),
    "max_tokens": 500,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "beeps", "schema": {"type": "array", "items": {"const": "beep"}, "minItems": 400}},
    },
}


def text_model() -> MultimodalModel:
    """Without media: no decoder has to start."""
    tokenizer = tiny_tokenizer()
    return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size)).eval()


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    torch.manual_seed(0)
    with running(text_model(), name=NAME, limits=LIMITS, api_key=KEY) as here:
        yield here


@pytest.fixture(scope="module")
def ai(here: Running) -> OpenAI:
    return client(here).with_options(api_key=KEY)


@contextmanager
def busy(ai: OpenAI, count: int) -> Iterator[None]:
    """While so many answers are written."""
    streams = [ai.chat.completions.create(model=NAME, stream=True, **ENDLESS) for _ in range(count)]
    for stream in streams:
        next(stream)
    yield
    for stream in streams:
        stream.close()


def refused(kind: type[openai.APIStatusError], code: str, ai: OpenAI, **body: Any) -> openai.APIStatusError:
    """What a chat is told, all of which is fixed by the code."""
    with pytest.raises(kind) as caught:
        ai.chat.completions.create(**{"model": NAME, "messages": user("?"), "max_tokens": 2, **body})
    error, told = caught.value, caught.value.body
    assert isinstance(told, dict) and type(error) is kind
    assert error.code == code and error.request_id == told["request_id"]
    assert (error.status_code, told["message"]) == CODES[code]
    return error


def test_each_status_is_the_clients_own_error(
    here: Running, ai: OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mm.serve")
    error = refused(openai.BadRequestError, "unknown_parameter", ai, extra_body={"tempersture": 1})
    assert error.param == "tempersture"
    assert f"{error.request_id} refused, unknown_parameter" in caplog.text  # where the operator finds it
    assert refused(openai.BadRequestError, "invalid_value", ai, temperature=3).param == "temperature"
    assert refused(openai.BadRequestError, "context_length_exceeded", ai, max_tokens=600).param == "messages"
    refused(openai.BadRequestError, "invalid_value", ai, messages=[])
    refused(openai.AuthenticationError, "invalid_api_key", ai.with_options(api_key="another"))
    refused(openai.PermissionDeniedError, "origin_not_allowed", ai, extra_headers={"Origin": "https://example.org"})
    assert refused(openai.NotFoundError, "model_not_found", ai, model="gpt").param == "model"
    monkeypatch.setattr(here.server, "messages", _raising(Refused("decoding_failed", "a child died")))
    refused(openai.UnprocessableEntityError, "decoding_failed", ai)
    monkeypatch.setattr(here.server, "messages", _raising(RuntimeError("a secret of the server's")))
    error = refused(openai.InternalServerError, "internal_error", ai)
    assert "secret" not in str(error.body) and "a secret of the server's" in caplog.text


def _raising(error: Exception) -> Any:
    async def messages(*args: Any) -> None:
        raise error

    return messages


def test_places(here: Running, ai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    with busy(ai, 2):
        error = refused(openai.RateLimitError, "too_many_requests", ai)
        assert int(error.response.headers["Retry-After"]) >= 1
        assert ai.models.list().data  # what takes no place is answered
        monkeypatch.setattr(here.server.places, "_limits", ServeLimits(slots=2, per_client=3))
        error = refused(openai.InternalServerError, "server_busy", ai)
        assert int(error.response.headers["Retry-After"]) >= 1
    patient = ai.with_options(max_retries=4)  # the client waits as long as it is told to
    assert patient.chat.completions.create(model=NAME, messages=user("?"), max_tokens=2).usage is not None


def test_time(here: Running, ai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ServeLimits(deadline_seconds=0.3, max_length=600, cache_tokens=2400)
    monkeypatch.setattr(here.server.app, "limits", limits)
    refused(openai.InternalServerError, "deadline_exceeded", ai, **ENDLESS)
    with pytest.raises(openai.APIError, match=r"longer than a request may") as caught:
        for _ in ai.chat.completions.create(model=NAME, stream=True, **ENDLESS):
            pass
    assert caught.value.code == "deadline_exceeded"
    assert within(5, lambda: here.server.places.used == 0)  # it is free once the connection knows of the end


def test_a_model_that_is_broken_says_so_and_the_server_lives() -> None:
    torch.manual_seed(0)
    model = text_model()
    with running(model, name=NAME) as here:
        ai = client(here)
        weight = next(model.decoder.parameters())
        whole = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        refused(openai.InternalServerError, "model_failed", ai)
        with pytest.raises(openai.APIError) as caught:
            list(ai.chat.completions.create(model=NAME, messages=user("!"), stream=True))
        assert caught.value.code == "model_failed"
        with torch.no_grad():
            weight.copy_(whole)
        step = here.server.worker.engine.step
        here.server.worker.engine.step = _failing  # type: ignore[method-assign]
        refused(openai.InternalServerError, "model_failed", ai, messages=user("how?"))
        assert here.server.worker.engine.step != step  # another engine
        found = ai.chat.completions.create(model=NAME, messages=user("red?"), max_tokens=2)
        assert found.usage is not None and found.usage.completion_tokens == 2
        with pytest.raises(openai.InternalServerError) as unable:
            ai.embeddings.create(model=NAME, input="red")
        assert (unable.value.status_code, unable.value.code) == (501, "not_supported")
        part: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        with pytest.raises(openai.APIStatusError) as blind:
            ai.chat.completions.create(model=NAME, messages=user([part]))
        assert blind.value.code == "unsupported_media_type"


def _failing() -> None:
    raise RuntimeError("no memory left")


def test_a_refusal_reaches_a_client_that_still_sends(here: Running, ai: OpenAI) -> None:
    """Its connection is not closed amid the body: that loses the answer."""
    for _ in range(20):
        refused(openai.AuthenticationError, "invalid_api_key", ai.with_options(api_key="another"))
    large = user("a" * (here.server.media_limits.body_bytes + 1_000_000))
    refused(openai.APIStatusError, "body_too_large", ai, messages=large)


def test_models(ai: OpenAI) -> None:
    [model] = ai.models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "mm") and model.created > 1_700_000_000
    assert ai.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("org/another")
    assert caught.value.code == "model_not_found"


ROUTES = ["/", "/page/x", "/health", "/metrics", "/v1/models", "/v1/models/tiny", "/v1/settings", "/v1/files/x", "/no"]


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_asks_for_the_key(here: Running, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic !"}, {"Authorization": KEY}):
        answer = httpx.get(here.url + path, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    page = httpx.get(here.url + path, headers={"Accept": "text/html"})
    assert page.headers["WWW-Authenticate"].startswith("Basic")  # a browser asks for it
    if path not in ("/", "/page/x"):
        assert httpx.get(here.url + path, auth=("", KEY)).status_code in (200, 404)


def test_addresses_and_methods(here: Running) -> None:
    ask = httpx.Client(base_url=here.url, headers={"Authorization": f"Bearer {KEY}"})
    for method, path, status, code in (
        ("GET", "/v1/none", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", 400, "malformed_json"),
    ):
        body: Any = {"content": "{", "headers": {"Content-Type": "application/json"}} if method == "POST" else {}
        answer = ask.request(method, path, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["X-Request-Id"] == answer.json()["error"]["request_id"]
    wrong = ask.post("/v1/chat/completions", content="a=1", headers={"Content-Type": "text/plain"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_health_settings_and_metrics(here: Running, ai: OpenAI) -> None:
    ask = httpx.Client(base_url=here.url, headers={"Authorization": f"Bearer {KEY}"})
    assert ask.get("/health").json() == {"status": "ok"}
    settings = ask.get("/v1/settings").json()
    assert settings["model"] == NAME and settings["kinds"] == [] and settings["embeddings"] is False
    assert settings["max_length"] == 600 and settings["limits"]["items"] == 16
    time.sleep(0.3)  # a request is counted once its answer is out: those of before are by now
    before = _metrics(ask)
    used = ai.chat.completions.create(model=NAME, messages=user("red?"), max_tokens=5, temperature=0).usage
    refused(openai.BadRequestError, "unknown_parameter", ai, extra_body={"tempersture": 1})
    time.sleep(0.3)
    after = _metrics(ask)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert used is not None and grown["mm_tokens_total", ()] == used.completion_tokens
    assert grown["mm_requests_total", (("route", "/v1/chat/completions"), ("status", "200"))] == 1
    assert grown["mm_requests_total", (("route", "/v1/chat/completions"), ("status", "400"))] == 1
    assert grown["mm_refused_total", (("code", "unknown_parameter"),)] == 1
    assert grown["mm_request_seconds_count", (("route", "/v1/chat/completions"),)] == 2
    assert grown["mm_first_token_seconds_count", ()] == 1
    assert after["mm_places_taken", ()] == after["mm_requests_running", ()] == 0 < after["mm_pages", ()]


def _metrics(ask: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = ask.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_settings_of_a_model_with_everything() -> None:
    from mm.serve.app import Server

    server = Server(tiny_model(embedding_dim=8).eval(), name=NAME)
    try:
        settings = server.settings()
    finally:
        server.close()
    assert settings["kinds"] == ["image", "audio", "video"] and settings["embeddings"] is True
    assert set(settings["formats"]) == {"image", "audio", "video"} and settings["limits"]["image_bytes"] == 10_000_000
