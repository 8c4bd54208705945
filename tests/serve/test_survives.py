"""What breaks is one request's misfortune: decoders that are killed, steps that fail, time that is up, places taken."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from mm.generation.batching import Engine
from mm.generation.constraints import FormNotFollowed
from mm.serve.limits import ServeLimits
from mm.serve.run import Running, running
from mm.testing import tiny_model

from .attack import CHAT, ELSEWHERE, answer, asked, check_error, idle, opened, processes, whole, within
from .files import film, picture
from .test_cancelled import shown

SMALL = shown("image", picture(side=8), "image/png") | {"stream": False, "max_tokens": 2}


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with running(tiny_model().eval()) as here:
        yield here


def code(found: httpx.Response) -> str:
    return check_error(found.status_code, found.headers, found.content)


def nursery(here: Running) -> int:
    decoder = here.server.decoder
    assert decoder is not None and decoder._nursery is not None
    return decoder._nursery._process.pid


def test_a_decoder_that_is_killed_is_one_requests_misfortune(here: Running) -> None:
    film_of_many: dict[str, Any] = shown("video", film(frames=600, size=(640, 480)), "video/mp4") | {"stream": False}
    film_of_many["messages"][0]["content"] = film_of_many["messages"][0]["content"][:1]
    parent = nursery(here)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(asked, here, film_of_many)
        assert within(10, lambda: bool(processes(parent)))
        for child in processes(parent):
            os.kill(child, signal.SIGSTOP)  # or it might have ended before it is killed
        assert asked(here).status_code == 200  # others go on meanwhile
        for child in processes(parent):
            os.kill(child, signal.SIGKILL)
        assert (asking.result().status_code, code(asking.result())) == (422, "decoding_failed")
    assert nursery(here) == parent and asked(here, SMALL).status_code == 200
    assert within(5, lambda: idle(here))


def test_a_nursery_that_is_killed_is_replaced(here: Running) -> None:
    parent = nursery(here)
    os.kill(parent, signal.SIGKILL)
    assert asked(here).status_code == 200
    assert asked(here, SMALL).status_code == 200
    assert nursery(here) != parent and within(5, lambda: idle(here))


def test_a_step_that_fails_ends_those_at_work_and_no_other(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    long = CHAT | {"max_tokens": 2000, "stream": True}
    with opened(here) as streaming, opened(here) as waiting:
        streaming.sendall(whole(here, long))
        waiting.sendall(whole(here, long | {"stream": False}))
        assert within(10, lambda: len(here.server.worker.engine.running) == 2)
        broken = here.server.worker.engine

        def step() -> None:
            raise RuntimeError("device-side assert")

        monkeypatch.setattr(broken, "step", step)
        streamed, found = answer(streaming), answer(waiting)
    assert found is not None and (found[0], check_error(*found)) == (500, "model_failed")
    assert streamed is not None and streamed[0] == 200
    *_, last, done, end = streamed[2].decode().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_failed"
    assert (done, end) == ("data: [DONE]", "")
    assert here.server.worker.engine is not broken and asked(here).status_code == 200
    assert within(5, lambda: idle(here))


def test_a_ticket_that_was_prepared_before_a_step_failed_is_answered(here: Running) -> None:
    """It belongs to the engine that takes it: else its pages would go back to the one that failed."""
    old = here.server.worker.engine
    make, broke = old.prepare, threading.Event()

    def prepare(*args: Any, **options: Any) -> Any:
        ticket = make(*args, **options)
        here.server.worker._act(lambda: setattr(here.server.worker, "engine", here.server._engine()) or broke.set())
        assert broke.wait(5)
        return ticket

    old.prepare = prepare  # type: ignore[method-assign]
    assert asked(here, CHAT | {"max_tokens": 20}).status_code == 200
    assert here.server.worker.engine is not old and within(5, lambda: idle(here))


def test_places_and_deadlines(plain: Any) -> None:
    limits = ServeLimits(slots=3, per_client=2, deadline_seconds=1.5, max_length=4096, answer_tokens=4000)
    long = {**CHAT, "max_tokens": 4000, "seed": 0}
    step = Engine.step
    with running(plain, limits=limits) as here, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", lambda engine: (time.sleep(0.05), step(engine)) and None)
        with opened(here) as first, opened(here) as second, opened(here, ELSEWHERE) as third:
            for connection, stream in ((first, True), (second, False), (third, True)):
                connection.sendall(whole(here, long | {"stream": stream}))
            assert within(5, lambda: here.server.places.used == 3)
            refused = asked(here)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert code(refused) == "too_many_requests"
            refused = asked(here, address=ELSEWHERE)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            assert code(refused) == "server_busy"
            streamed, found = answer(first), answer(second)
            assert found is not None and (found[0], check_error(*found)) == (504, "deadline_exceeded")
            assert streamed is not None and streamed[0] == 200
            *_, last, done, _ = streamed[2].decode().split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
            assert done == "data: [DONE]" and answer(third) is not None
        assert within(5, lambda: idle(here))
        assert asked(here).status_code == 200


HEAVY = ("references that cross", "800 properties", "a value of 30,000 letters")
EXPLODING: dict[str, Any] = {
    "references that cross": {
        "$ref": "#/$defs/a0",
        "$defs": {
            f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{(i * 7 + j) % 100}"} for j in range(10)]} for i in range(100)
        },
    },
    "itself": {"$ref": "#"},
    "a tree without end": {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}, "required": ["a"]},
    "quantifiers in quantifiers": {"type": "string", "pattern": "^(((a{1,100}){1,100}){1,100}){1,100}$"},
    "stars of stars": {"type": "string", "pattern": "^(((a*)*)*)*b$"},
    "a million states": {"type": "string", "pattern": "^(.|\\n)*a(.|\\n){20}$"},
    "a million letters": {"type": "string", "minLength": 10**6},
    "a million items": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    "a value of a million letters": {"enum": ["a" * 10**6]},
    "20,000 values": {"enum": [f"v{i}" for i in range(20_000)]},
    "800 properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(800)}},
    "a value of 30,000 letters": {"enum": ["a" * 30_000]},
    "9,000 properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9_000)}},
    "all of 10**20": {
        "allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {"const": j}}} for j in range(10)]} for i in range(20)]
    },
    "elsewhere": {"$ref": "http://127.0.0.1/schema"},
    "a file": {"$ref": "file:///etc/passwd"},
    "no regular expression": {"type": "string", "pattern": "((("},
    "a grammar": {"%lark": "start: start start | start start start | /a/"},
}
LIGHT = [name for name in EXPLODING if name not in HEAVY]


@pytest.mark.parametrize("names", [LIGHT, pytest.param(list(EXPLODING), marks=pytest.mark.slow)], ids=["light", "all"])
def test_schemas_that_explode_hold_up_nobody(plain: Any, names: list[str], tell: Callable[[str], None]) -> None:
    codes, longest = Counter[str](), 0.0
    with running(plain) as here, ThreadPoolExecutor(1) as pool:
        for name in names:
            wanted = {"type": "json_schema", "json_schema": {"schema": EXPLODING[name]}}
            form = CHAT | {"response_format": wanted}
            start = time.monotonic()
            asking = pool.submit(asked, here, form, ELSEWHERE)
            assert asked(here).status_code == 200, name
            others = time.monotonic() - start
            found = asking.result()
            assert others < 3 and time.monotonic() - start < 10, name
            codes["answered" if found.status_code == 200 else code(found)] += 1
            longest = max(longest, others)
    assert set(codes) <= {"answered", "invalid_schema", "invalid_value"} and codes["invalid_schema"]
    tell(f"{len(names)} schemas: {dict(codes)}; a chat beside each took {longest:.2f} s at most")


def test_a_form_that_cannot_be_followed_further_fails_alone(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an answer, while others are written in the same steps."""
    engine = here.server.worker.engine
    prepare, step, arrived = engine.prepare, engine.step, threading.Event()

    def held() -> None:  # the other answer, which may be short, waits before its first token for the form
        if engine.running and not arrived.is_set():
            time.sleep(0.005)
        else:
            step()

    def prepared(*args: Any, **options: Any) -> Any:
        ticket = prepare(*args, **options)
        if ticket.shaper.constraint is not None:
            arrived.set()
            mask = ticket.shaper.constraint.mask

            def third(logits: Any) -> Any:
                if ticket.ids:  # even the shortest object has two tokens
                    raise FormNotFollowed("too many states")
                return mask(logits)

            ticket.shaper.constraint.mask = third
        return ticket

    monkeypatch.setattr(engine, "prepare", prepared)
    monkeypatch.setattr(engine, "step", held)
    form = CHAT | {"max_tokens": 40, "response_format": {"type": "json_object"}}
    with opened(here) as other:
        other.sendall(whole(here, CHAT | {"max_tokens": 300}))
        assert within(5, lambda: bool(engine.running))
        assert code(asked(here, form)) == "invalid_schema"
        found = answer(other)
    assert found is not None and found[0] == 200 and here.server.worker.engine is engine
