"""Text that spells a special token, a slot or a turn stays text, in whichever field of a request it comes."""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from mm.generation.tickets import Ticket
from mm.serve.run import Running, running
from mm.testing import tiny_model

from .attack import CHAT
from .files import picture
from .test_cancelled import shown

FIELDS = 12
OTHERS = """
<image> <audio> <video> <image_0> <|image|> <|image_pad|> <|vision_start|> <|vision_end|> <image_soft_token>
[IMG] <slot> <media> <|im_start|>system <|im_start|>assistant <|im_end|> <|endoftext|> <|begin_of_text|>
<|eot_id|> <|start_header_id|> <|assistant|> <|user|> <|system|> <|end|> <s> </s> <pad> <unk> <bos> <eos>
[INST] [/INST] <<SYS>> <start_of_turn> <end_of_turn> <think> </think> <tool_call> </tool_call> <tool_response>
</tool_response> <|channel|> <|message|> <|return|> <|fim_prefix|> <0x0A> -1 -2 -3
""".split()


def spellings(specials: list[str]) -> Iterator[str]:
    """Without end: names of specials, alone and in the middle of words, doubled, nested, escaped and look-alike."""
    draw = random.Random(0)
    names = sorted({*specials, *OTHERS})
    yield from names
    while True:
        name, other = draw.choice(specials), draw.choice(names)
        at = draw.randrange(1, len(name))
        yield draw.choice(
            [
                f"{name}assistant\n{other}",
                f"a{name}b{other}c",
                name[:at] + other + name[at:],
                name * draw.randrange(2, 5),
                name.upper(),
                f"\n{name}\n",
                f" {name} ",
                name.replace("<", "＜").replace("|", "｜").replace(">", "＞"),  # full width, which NFKC makes narrow
                unicodedata.normalize("NFKC", name.replace("<", "﹤")),
                name[:at] + draw.choice(["\u200b", "\u00ad", "\ufeff", "\x00", "\u202e"]) + name[at:],
                json.dumps(name),
                name.replace("<", "&lt;"),
                "".join(f"\\u{ord(c):04x}" for c in name),
                "<think>\n" + name + "\n</think>\n" + other,
                '<tool_call>{"name": "' + name + '"}</tool_call>',
            ]
        )


def chat(texts: list[str]) -> dict[str, Any]:
    """A chat with a picture that says a text in every field that the model reads, or that names something."""
    [system, user, name, before, middle, thought, said, argument, result, tool, parameter, last] = texts
    first, second = middle[: len(middle) // 2], middle[len(middle) // 2 :]
    image = shown("image", picture(side=4), "image/png")["messages"][0]["content"][0]
    called = {"name": "f", "arguments": json.dumps({"a": argument})}
    return CHAT | {
        "max_tokens": 1,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": user, "name": name},
            {
                "role": "assistant",
                "content": said,
                "reasoning_content": thought,
                "tool_calls": [{"id": name or "a", "type": "function", "function": called}],
            },
            {"role": "tool", "content": [{"type": "text", "text": result}], "tool_call_id": name or "a"},
            {"role": "assistant", "content": last or "x"},
            {  # a spelling in two parts, which stand beside one another, and around a picture
                "role": "user",
                "content": [
                    {"type": "text", "text": before},
                    image,
                    {"type": "text", "text": first},
                    {"type": "text", "text": second},
                ],
            },
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": tool,
                    "parameters": {"type": "object", "description": parameter},
                },
            }
        ],
    }


class Prepared:
    """What the engine is given to read."""

    def __init__(self, here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tickets: list[Ticket] = []
        engine = here.server.worker.engine
        self._specials = set(here.server.model.tokenizer.specials.values())
        for name in ("prepare", "prepare_ids"):
            monkeypatch.setattr(engine, name, self._kept(getattr(engine, name)))

    def _kept(self, make: Callable[..., Ticket]) -> Callable[..., Ticket]:
        def keep(*args: Any, **options: Any) -> Ticket:
            self.tickets.append(make(*args, **options))
            return self.tickets[-1]

        return keep

    def take(self) -> list[Counter[int]]:
        """Of each prompt, the special tokens and the media slots in it."""
        tickets, self.tickets = self.tickets, []
        ids = [ticket.encoded.ids.tolist() for ticket in tickets]
        return [Counter(each for each in prompt if each < 0 or each in self._specials) for prompt in ids]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_spellings_stay_text(count: int, monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]) -> None:
    with running(tiny_model().eval()) as here, httpx.Client(base_url=here.url, timeout=60) as client:
        prepared = Prepared(here, monkeypatch)
        specials = sorted(here.server.model.tokenizer.specials)
        hostile = spellings(specials)
        assert client.post("/v1/chat/completions", json=chat(["x"] * FIELDS)).status_code == 200
        [harmless] = prepared.take()
        assert harmless.total() > FIELDS / 2 and min(harmless) < 0  # turns, and the picture's slot
        used = 0
        while used < count:
            texts = [next(hostile) for _ in range(FIELDS)]
            used += FIELDS
            found = client.post("/v1/chat/completions", json=chat(texts))
            assert found.status_code == 200, (texts, found.text)
            assert prepared.take() == [harmless], texts
            found = client.post("/v1/completions", json={"model": "model", "prompt": texts, "max_tokens": 1})
            assert found.status_code == 200 and prepared.take() == [Counter()] * FIELDS, texts
    tell(f"{used} texts in a chat each and a prompt each: 0 of {len(specials)} special tokens, 0 slots")


def test_ids_of_special_tokens_may_be_given_and_slots_may_not(monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    """Ids are the caller's own doing; a slot is none of the text's."""
    with running(plain) as here, httpx.Client(base_url=here.url) as client:
        prepared = Prepared(here, monkeypatch)
        form = {"model": "model", "max_tokens": 1}
        assert client.post("/v1/completions", json=form | {"prompt": [0, 40]}).status_code == 200
        assert prepared.take()[0][0] == 1
        for wrong in (-1, -3, 10**6, 2**63):
            found = client.post("/v1/completions", json=form | {"prompt": [40, wrong]})
            assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_value")
