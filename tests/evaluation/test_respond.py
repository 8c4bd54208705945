"""Generated text: the texts that end it end its row too, and the batch changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.respond import continue_texts, respond, seed_of
from mm.generation import generate_ids
from mm.generation.stopping import cut_before
from mm.model import MultimodalModel
from mm.testing import tiny_model
from mm.types import Sample

TEXTS = ["what color is", "the shape is red or", "how many", "green? blue? two beeps and", "is"]
STOP = ("e", "or", "\n")


class Plain(Benchmark):
    name = "plain"
    plain = True
    max_new_tokens = 10
    stop = STOP

    def __init__(self, temperature: float, plain: bool) -> None:
        self.temperature, self.plain = temperature, plain

    def samples(self) -> list[Sample]:
        return samples()


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(2)
    return tiny_model().eval()


def samples() -> list[Sample]:
    return [Sample(f"q{i}", [{"role": "user", "content": text}]) for i, text in enumerate(TEXTS * 2)]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_changes_nothing(model: MultimodalModel, temperature: float, plain: bool) -> None:
    found = [[answer.text for answer in respond(model, Plain(temperature, plain), samples(), size)] for size in (1, 4)]
    assert found[0] == found[1]
    assert len(set(found[0])) > 3 and not any(stop in text for text in found[0] for stop in STOP)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_ends_a_text_ends_its_row(model: MultimodalModel, temperature: float, monkeypatch: Any) -> None:
    """The texts are those that would be cut afterwards, and nothing is decoded behind them."""
    rows: list[int] = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda ids, cache: rows.append(len(ids)) or step(ids, cache))
    stopped = continue_texts(model, samples(), 24, temperature=temperature, stop=STOP, batch_size=8)
    decoded, rows[:] = sum(rows), []
    whole = continue_texts(model, samples(), 24, temperature=temperature, batch_size=8)
    assert stopped == [cut_before(text, STOP) for text in whole] and stopped != whole
    assert decoded < sum(rows)


def test_each_text_is_its_own_continuation(model: MultimodalModel) -> None:
    asked = samples()[:3]
    for sample, text in zip(asked, continue_texts(model, asked, 6, temperature=1.0), strict=True):
        ids = torch.tensor([model.tokenizer.encode(sample.messages[0]["content"])])
        alone = generate_ids(model, ids, max_new_tokens=6, temperature=1.0, seed=[seed_of(sample)])[0].tolist()
        assert text == model.tokenizer.decode(alone)
