"""`model.generate`: ids or a chat, the same options for both, and one clear error for each mistake."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.generation import generate, generate_ids
from mm.model import MultimodalModel
from mm.testing import picture, tiny_model
from mm.types import Media, MediaError, Sample


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return tiny_model().eval()


IDS = torch.tensor([[20, 30, 40], [0, 60, 70]])
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
CHAT = [{"role": "user", "content": "what color is it?"}]
OPTIONS: list[dict[str, Any]] = [
    {}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}, {"num_beams": 3}, {"cache": "int8"},
    {"draft": "lookup"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ids_in_ids_out(model: MultimodalModel, options: dict[str, Any]) -> None:
    new = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, **options)
    assert torch.equal(new, generate_ids(model, IDS, MASK, max_new_tokens=6, **options))
    assert torch.equal(new, model.generate(IDS, MASK, max_new_tokens=6, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_chat_in_text_out(model: MultimodalModel, options: dict[str, Any]) -> None:
    text = model.generate(messages=CHAT, max_new_tokens=6, **options)
    assert type(text) is str
    assert text == generate(model, [Sample("chat", CHAT)], max_new_tokens=6, **options)[0].text


def test_a_chat_with_a_picture_that_goes_on(model: MultimodalModel, tmp_path: Any) -> None:
    shown = picture(3)
    assert isinstance(shown.data, bytes)
    (tmp_path / "a.png").write_bytes(shown.data)

    def ask(image: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]

    chats = [ask(image) for image in (shown, shown.data, str(tmp_path / "a.png"), tmp_path / "a.png")]
    texts = {model.generate(messages=chat, max_new_tokens=8) for chat in chats}
    assert len(texts) == 1 and texts != {model.generate(messages=ask(picture(4)), max_new_tokens=8)}
    longer = [*chats[0], {"role": "assistant", "content": texts.pop()}, {"role": "user", "content": "why?"}]
    assert isinstance(model.generate(messages=longer, max_new_tokens=4), str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids or messages, one of the two; neither given"),
        ({"input_ids": IDS, "messages": CHAT}, "both given"),
        ({"messages": CHAT, "attention_mask": MASK}, "attention_mask goes with input_ids"),
        ({"messages": CHAT, "stop": [3]}, "stop goes with input_ids.*stop_strings"),
        ({"messages": CHAT, "logprobs": 2}, "logprobs: a chat's answer is text alone"),
        ({"messages": []}, "at least one message"),
        ({"messages": [CHAT]}, 'message 1: "role"'),
        ({"messages": [{"role": "user", "content": ""}]}, "sample chat: the prompt is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, "the prompt is empty"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "a"}]}, "the last message is the assistant's"),
        ({"messages": CHAT, "max_length": 12}, "sample chat: a prompt of .* exceed the context of 12"),
        (
            {"input_ids": IDS, "max_length": 6},
            "row 0 of input_ids: a prompt of 3 positions and max_new_tokens=4 exceed",
        ),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "row 0 of input_ids is empty"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(2, 3)}, "row 0 of input_ids is empty"),
        ({"input_ids": IDS, "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"messages": CHAT, "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"messages": CHAT, "num_beams": 2, "temperature": 1.0}, "num_beams and temperature do not go together"),
        ({"messages": CHAT, "cache": "tape"}, "cache='tape'"),
    ],
)
def test_mistakes(model: MultimodalModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model.generate(**{"max_new_tokens": 4, **arguments})
    assert "\n" not in str(error.value)


def test_within_the_context_is_fine(model: MultimodalModel) -> None:
    assert model.generate(IDS, MASK, max_new_tokens=4, max_length=7).shape[1] <= 4


def test_a_picture_that_is_not_there(model: MultimodalModel) -> None:
    part = {"type": "image", "image": "gone.png"}
    with pytest.raises(MediaError, match=r"gone\.png"):
        model.generate(messages=[{"role": "user", "content": [part]}])
    with pytest.raises(MediaError, match="image 1"):
        model.generate(
            messages=[{"role": "user", "content": [{"type": "image", "image": Media("image", b"", "image 1")}]}]
        )


def test_logits_that_are_no_numbers() -> None:
    broken = tiny_model().eval()
    with torch.no_grad():
        broken.decoder.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="sample chat: the logits for token 1 .* are NaN"):
        broken.generate(messages=CHAT)
    with pytest.raises(ValueError, match="row 0 of input_ids: the logits for token 1 .* are NaN"):
        broken.generate(IDS)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        tiny_model().train().generate(messages=CHAT)
