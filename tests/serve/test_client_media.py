"""Images, sounds and videos through OpenAI's client, by every part: answered as the model does with the same files."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI

from mm.datasets.decode import decode
from mm.serve.limits import MediaLimits
from mm.serve.other import embed_media
from mm.serve.run import Running, running
from mm.testing import tiny_model
from mm.tools.embeddings import TextEmbedder
from mm.types import Kind, Media

from .clients import async_client, client, said, user
from .conftest import PUBLIC, Web
from .files import film, picture, sound

NAME = "tiny"
QUESTION: Any = {"type": "text", "text": "what colour?"}
FILES: dict[str, tuple[Kind, bytes]] = {
    "png": ("image", picture()),
    "jpg": ("image", picture("JPEG", 24)),
    "wav": ("audio", sound()),
    "mp3": ("audio", sound("MP3")),
    "mp4": ("video", film()),
    "webm": ("video", film("webm", "libvpx")),
}
MIME = {"mp3": "audio/mpeg", "wav": "audio/wav", "jpg": "image/jpeg"}


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    web = Web()
    web.names["images.example.org"] = [[PUBLIC]]
    yield web
    web.close()


@pytest.fixture(scope="module")
def here(web: Web) -> Iterator[Running]:
    torch.manual_seed(0)
    media = MediaLimits(items=4, image_bytes=1_000_000, hosts=("images.example.org",))
    with running(tiny_model(embedding_dim=16).eval(), name=NAME, media=media, network=web.network) as here:
        yield here


@pytest.fixture(scope="module")
def ai(here: Running) -> OpenAI:
    return client(here)


def url(name: str) -> str:
    kind, data = FILES[name]
    return f"data:{MIME.get(name, f'{kind}/{name}')};base64,{base64.b64encode(data).decode()}"


def part(name: str, way: str, ai: OpenAI) -> dict[str, Any]:
    """The part that shows a file in one of the ways there are."""
    kind, data = FILES[name]
    match way:
        case "url":
            return {"type": f"{kind}_url", f"{kind}_url": {"url": url(name)}}
        case "input_audio":
            return {"type": way, way: {"data": base64.b64encode(data).decode(), "format": name}}
        case "file_data":
            return {"type": "file", "file": {"file_data": url(name), "filename": f"a.{name}"}}
        case "base64":
            return {"type": "file", "file": {"file_data": base64.b64encode(data).decode()}}
        case "file_id":
            return {
                "type": "file",
                "file": {"file_id": ai.files.create(file=(f"a.{name}", data), purpose="user_data").id},
            }
    raise AssertionError(way)


def plain(name: str) -> dict[str, Any]:
    kind, data = FILES[name]
    return {"type": kind, kind: data}


WAYS = [
    *((name, way) for name in ("png", "wav", "mp4") for way in ("url", "file_data", "file_id")),
    *(("jpg", "url"), ("mp3", "url"), ("webm", "url"), ("png", "base64")),
    *(("wav", "input_audio"), ("mp3", "input_audio")),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_each_part_says_what_its_file_says(here: Running, ai: OpenAI, name: str, way: str) -> None:
    expected = said(here.server.model, user([plain(name), QUESTION]), 8)
    chat: Any = user([part(name, way, ai), QUESTION])
    found = ai.chat.completions.create(model=NAME, messages=chat, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == expected.text
    assert found.usage is not None and found.usage.prompt_tokens == expected.prompt_length
    assert expected.text != said(here.server.model, user([QUESTION]), 8).text  # it tells


def test_many_media_in_a_chat_keep_their_places(here: Running, ai: OpenAI) -> None:
    names = ["mp4", "png", "wav", "jpg"]
    chat = lambda make: [  # noqa: E731
        *user([make(names[0]), QUESTION, make(names[1])]),
        {"role": "assistant", "content": "red"},
        *user([make(names[2]), make(names[3]), QUESTION]),
    ]
    expected = said(here.server.model, chat(plain), 12, logprobs=0)
    assert expected.logprobs is not None
    found = ai.chat.completions.create(
        model=NAME, messages=chat(lambda name: part(name, "url", ai)), max_tokens=12, temperature=0, logprobs=True
    ).choices[0]
    assert found.message.content == expected.text and found.logprobs is not None and found.logprobs.content is not None
    likely = [each.logprob for each in found.logprobs.content]
    assert likely == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-4)


def test_what_was_shown_before_is_found_again(here: Running, ai: OpenAI) -> None:
    long = {"type": "text", "text": "what colour is the shape, how many beeps, red or green?"}
    counts = here.server.worker.engine.counts
    encoded, texts, cached = [], set(), []
    for _ in range(2):
        chat: Any = user([part("webm", "file_id", ai), long])
        found = ai.chat.completions.create(model=NAME, messages=chat, max_tokens=8, temperature=0)
        encoded.append(counts.encoded)
        texts.add(found.choices[0].message.content)
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        cached.append(found.usage.prompt_tokens_details.cached_tokens)
    assert encoded[0] == encoded[1] and len(texts) == 1 and cached[1] >= 32


def test_different_kinds_at_once_are_answered_as_alone(here: Running, ai: OpenAI) -> None:
    asked: list[list[Any]] = [[name] for name in FILES] + [[], ["png", "wav"]]
    expected = [said(here.server.model, user([*map(plain, names), QUESTION]), 12).text for names in asked]

    async def together() -> list[Any]:
        async with async_client(here) as many:
            return await asyncio.gather(
                *(
                    many.chat.completions.create(
                        model=NAME,
                        messages=user([*(part(name, "url", ai) for name in names), QUESTION]),
                        max_tokens=12,
                        temperature=0,
                    )
                    for names in asked
                )
            )

    assert [found.choices[0].message.content for found in asyncio.run(together())] == expected


def test_allowed_hosts_are_asked(ai: OpenAI, web: Web) -> None:
    for path, code in (("missing", "url_not_fetched"), ("file", "unsupported_media_type")):
        with pytest.raises(openai.APIStatusError) as caught:
            ai.chat.completions.create(model=NAME, messages=user([image(f"http://images.example.org/{path}")]))
        assert caught.value.code == code
    assert web.hosts == ["images.example.org"] * 2


def image(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


PCM = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "pcm16"}}
BROKEN: list[tuple[Any, type[openai.APIStatusError], str]] = [
    (image("https://example.org/a.png"), openai.BadRequestError, "url_not_allowed"),
    (image("data:image/png;base64,!!"), openai.BadRequestError, "malformed_base64"),
    (image(url("png")[:-200]), openai.BadRequestError, "media_unreadable"),
    (image(url("wav")), openai.APIStatusError, "unsupported_media_type"),
    ({"type": "file", "file": {"file_id": "file-nothing"}}, openai.NotFoundError, "file_not_found"),
    ({"type": "file", "file": {}}, openai.BadRequestError, "missing_parameter"),
    (PCM, openai.BadRequestError, "invalid_value"),
    ({"type": "picture", "url": "x"}, openai.BadRequestError, "invalid_value"),
]


@pytest.mark.parametrize(("shown", "kind", "code"), BROKEN, ids=[code for *_, code in BROKEN])
def test_media_that_cannot_be_read_are_refused(ai: OpenAI, shown: Any, kind: Any, code: str) -> None:
    with pytest.raises(kind) as caught:
        ai.chat.completions.create(model=NAME, messages=user([shown, QUESTION]))
    assert caught.value.code == code and caught.value.request_id


def test_too_many_and_too_large(ai: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model=NAME, messages=user([part("png", "url", ai)] * 5))  # type: ignore[list-item]
    assert caught.value.code == "too_many_items"
    noise = np.random.default_rng(0).bytes(1_000_001)
    large: Any = image(f"data:;base64,{base64.b64encode(noise).decode()}")
    with pytest.raises(openai.APIStatusError) as refused:
        ai.chat.completions.create(model=NAME, messages=user([large]))
    assert (refused.value.status_code, refused.value.code) == (413, "media_too_large")


def test_uploads(ai: OpenAI) -> None:
    stored = ai.files.create(file=("wave.wav", io.BytesIO(sound())), purpose="user_data")
    assert (stored.filename, stored.bytes, stored.purpose) == ("wave.wav", len(sound()), "user_data")
    assert ai.files.retrieve(stored.id) == stored
    assert ai.files.delete(stored.id).deleted
    for again in (ai.files.retrieve, ai.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            again(stored.id)
        assert caught.value.code == "file_not_found"


def test_embeddings_of_texts_and_media_lie_in_one_space(here: Running, ai: OpenAI) -> None:
    model, texts = here.server.model, ["red", "how many beeps?", "what colour is the shape?"]
    expected = TextEmbedder(model, "tower")(texts)
    as_bytes = ai.embeddings.create(model=NAME, input=texts)  # the client asks for base64
    as_numbers = ai.embeddings.create(model=NAME, input=texts, encoding_format="float", dimensions=16)
    for found in (as_bytes, as_numbers):
        assert [each.index for each in found.data] == [0, 1, 2]
        np.testing.assert_allclose([each.embedding for each in found.data], expected, atol=1e-6)
    assert as_bytes.usage.prompt_tokens == sum(len(model.tokenizer.encode(text)) for text in texts)
    [one] = ai.embeddings.create(model=NAME, input=texts[1]).data
    np.testing.assert_allclose(one.embedding, expected[1], atol=1e-6)
    mixed: Any = [part("png", "url", ai), texts[0], part("wav", "input_audio", ai), {"type": "text", "text": texts[1]}]
    found = [each.embedding for each in ai.embeddings.create(model=NAME, input=mixed).data]
    np.testing.assert_allclose(found[1::2], expected[:2], atol=1e-6)
    for vector, name in zip(found[::2], ("png", "wav"), strict=True):
        kind, data = FILES[name]
        tokenizer: Any = model.media_specs()[kind].tokenizer
        tokens = tokenizer(decode(Media(kind, data, name), resizer=tokenizer if kind == "image" else None))
        np.testing.assert_allclose(vector, embed_media(model, Media(kind, b"", name, tokens)), atol=1e-6)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "code"),
    [({"input": ""}, "invalid_value"), ({"input": []}, "invalid_value"), ({"input": ["a"] * 257}, "too_many_items"),
     ({"input": "a", "dimensions": 8}, "invalid_value"), ({"input": "a " * 5000}, "context_length_exceeded"),
     ({"input": [1, 2]}, "invalid_value")],
)  # fmt: skip
def test_nonsense_is_not_embedded(ai: OpenAI, body: Any, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.embeddings.create(model=NAME, **body)
    assert caught.value.code == code
