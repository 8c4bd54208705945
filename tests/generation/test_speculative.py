"""Speculative decoding: the same answers greedy, the same distribution sampled, whatever drafts."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.attention.ssm import Mamba2
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.mtp import MultiTokenPrediction
from mm.generation.engine import generate_ids
from mm.generation.options import Decoding
from mm.generation.requests import Prompts
from mm.generation.speculative import Counts, LookupDrafter, speculate
from mm.model import MultimodalModel
from mm.testing import tiny_tokenizer


def model_of(tokenizer, seed: int, width: int = 24, depths: int = 0, mixer: Any = GroupedAttention) -> MultimodalModel:
    torch.manual_seed(seed)

    def attention(width: int) -> torch.nn.Module:
        return mixer(width, heads=2)

    def ffn(width: int) -> torch.nn.Module:
        return GatedFFN(width, hidden=16)

    decoder = Decoder(
        width,
        {"m": attention},
        {"f": ffn},
        [LayerGroup(["m/f"], 2)],
        tokenizer.vocab_size,
        mtp=(lambda width: MultiTokenPrediction(width, attention, ffn, depths)) if depths else None,
    )
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[-1] ** 0.5)
    return MultimodalModel(tokenizer, decoder).eval()


@pytest.fixture(scope="module")
def model(tokenizer) -> MultimodalModel:
    return model_of(tokenizer, 0, depths=2)


def near(model: MultimodalModel, tokenizer, noise: float) -> MultimodalModel:
    """A draft that often agrees: the same weights, somewhat off."""
    other = model_of(tokenizer, 0, depths=2)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module", params=["near", "far", "same", "lookup", "mtp"])
def draft(request, model, tokenizer):
    made = {
        "near": lambda: near(model, tokenizer, 0.1),
        "far": lambda: model_of(tokenizer, 5, 16),
        "same": lambda: model,
    }
    return made[request.param]() if request.param in made else request.param


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 60, (1, length), generator=torch.Generator().manual_seed(seed))


PENALTY = {"repetition_penalty": 1.3}
USUAL: list[Any] = [(1, 4, {}), (2, 1, PENALTY), (11, 1, {}), (11, 4, PENALTY)]
OTHERS: list[Any] = [each for each in product((1, 2, 11), (1, 4), ({}, PENALTY)) if each not in USUAL]


@pytest.mark.parametrize(
    ("length", "draft_length", "options"),
    [*USUAL, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)],
    ids=str,
)
def test_greedy_is_the_same(model, draft, length, draft_length, options) -> None:
    ids = prompt(length)
    expected = generate_ids(model, ids, max_new_tokens=30, stop=[], **options)
    found = generate_ids(model, ids, max_new_tokens=30, stop=[], draft=draft, draft_length=draft_length, **options)
    assert torch.equal(found, expected)
    stop = [int(expected[0, 7])]
    ended = generate_ids(model, ids, max_new_tokens=30, stop=stop, draft=draft, **options)
    assert torch.equal(ended, generate_ids(model, ids, max_new_tokens=30, stop=stop, **options))


def test_rows_of_a_batch(model, draft) -> None:
    ids, mask = prompt(9).expand(3, -1).clone(), torch.ones(3, 9, dtype=torch.long)
    mask[1, :5], ids[2, 3] = 0, 17
    expected = generate_ids(model, ids, mask, 12, stop=[5])
    assert torch.equal(generate_ids(model, ids, mask, 12, stop=[5], draft=draft), expected)


def test_what_a_good_draft_saves(model, tokenizer) -> None:
    ids = prompt(6)
    counts = {}
    for name, other in {"same": model, "near": near(model, tokenizer, 0.1), "far": model_of(tokenizer, 5)}.items():
        counts[name] = Counts()
        asked = Prompts({"input_ids": ids}, [ids[0]], ["it"], [torch.Generator()])
        steps = list(speculate(model, asked, Decoding(draft=other), [], 41, counts[name]))
        assert len(steps) == 41
    assert counts["same"].rate == 1 and counts["same"].passes == 8  # 40 tokens after the first, 5 a pass
    assert 1 > counts["near"].rate > counts["far"].rate


def test_lookup_proposes_what_followed() -> None:
    def propose(text: list[int], count: int) -> list[int]:
        drafter = LookupDrafter(Prompts({}, [torch.tensor(text[:4])], ["it"], []))
        return drafter.propose(text[4:], count, None).ids

    assert propose([1, 2, 3, 9, 1, 2, 3], 3) == [9, 1, 2]
    assert propose([1, 2, 3, 9, 5, 3], 1) == [9]
    assert propose([1, 2, 3, 4, 5], 3) == []
    assert propose([7, -1, 3, 9, 7], 3) == []  # a picture is no text to copy


@pytest.mark.parametrize("n", [80, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["near", "far", "lookup", "mtp"])
def test_sampling_keeps_the_distribution(tokenizer, kind, n) -> None:
    """Pairs of the second and third token of many answers, against plain sampling's exact probabilities."""
    model = model_of(tokenizer, 0, depths=2)
    draft = {"near": near(model, tokenizer, 0.5), "far": model_of(tokenizer, 5)}.get(kind, kind)
    options: Any = {"temperature": 0.9, "top_k": 3}
    ids = torch.tensor([[20, 30, 20, 30, 20]])
    drafted = options | {"draft": draft, "draft_length": 2, "max_new_tokens": 3, "stop": []}
    rows = [tuple(generate_ids(model, ids, seed=[s], **drafted)[0].tolist()) for s in range(n)]
    sampler = Decoding(**options)

    def after(prefix: tuple[int, ...]) -> torch.Tensor:
        logits = model(input_ids=torch.cat([ids, torch.tensor([prefix], dtype=torch.long)], 1)).logits[:, -1]
        return sampler.filter(logits)[0].double().softmax(-1)

    expected: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            expected = {
                (*prefix, token): mass * float(p)
                for prefix, mass in expected.items()
                for token, p in enumerate(after(prefix))
                if p > 0
            }
    assert set(rows) <= set(expected)
    statistic = sum((rows.count(row) - n * p) ** 2 / (n * p) for row, p in expected.items())
    freedom = len(expected) - 1
    # The chi-square's mean is its degrees of freedom and its variance twice that; 4 deviations, and seeds are fixed.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, f"{statistic:.0f} at {freedom} degrees of freedom"


def test_what_cannot_be_is_refused(model, tokenizer) -> None:
    ids = prompt(4)
    with pytest.raises(ValueError, match="tokenizer is another"):
        generate_ids(model, ids, draft=model_of(tiny_tokenizer(320), 3))
    with pytest.raises(ValueError, match="Mamba2 cannot forget"):
        generate_ids(model_of(tokenizer, 0, mixer=lambda width, heads: Mamba2(width, head_dim=12)), ids, draft="lookup")
    with pytest.raises(ValueError, match="no modules for multi-token prediction"):
        generate_ids(model_of(tokenizer, 0), ids, draft="mtp")
    other = [{"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 4}]
    refused: list[Any] = [*other, {"cache": "window"}, {"cache": "evict:64"}]
    for options in refused:
        with pytest.raises(ValueError, match="draft"):
            Decoding(draft="lookup", **options)
    with pytest.raises(ValueError, match="draft='guess'"):
        Decoding(draft="guess")
