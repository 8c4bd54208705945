"""Contrastive search and contrastive decoding, against their definitions written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mm.generation.engine import generate_ids
from mm.generation.sampling import contrast
from mm.model import MultimodalModel
from mm.testing import tiny_decoder, tiny_tokenizer


def model_of(tokenizer, seed: int) -> MultimodalModel:
    torch.manual_seed(seed)
    model = MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size))
    for parameter in model.decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 / parameter.shape[-1] ** 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer) -> MultimodalModel:
    return model_of(tokenizer, 0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
def test_contrastive_search(model, alpha: float) -> None:
    """Everything read anew for every candidate of every step."""
    prompts, top_k = [[40, 50, 60, 70], [90, 30]], 5
    ids = torch.tensor([prompts[0], [*prompts[1], 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = generate_ids(model, ids, mask, 10, stop=[], top_k=top_k, penalty_alpha=alpha)
    for row, prompt in zip(found.tolist(), prompts, strict=True):
        text = list(prompt)
        for _ in range(10):
            with torch.no_grad():
                p, candidates = model(input_ids=torch.tensor([text])).logits[0, -1].softmax(-1).topk(top_k)
                scores = []
                for probability, candidate in zip(p, candidates, strict=True):
                    hidden = F.normalize(model(input_ids=torch.tensor([[*text, int(candidate)]])).hidden[0], dim=-1)
                    scores.append((1 - alpha) * probability - alpha * (hidden[:-1] @ hidden[-1]).max())
            text.append(int(candidates[torch.stack(scores).argmax()]))
        assert row == text[len(prompt) :]


def test_contrast_by_hand() -> None:
    expert = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    amateur = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    found = contrast(expert, amateur, 0.2)
    torch.testing.assert_close(found[0, :3].exp(), torch.tensor([0.5 / 0.7, 3.0, 1.5]))
    assert found[0, 3] == -torch.inf
    assert contrast(expert, amateur, 1.0).isfinite().tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache": "int8"}], ids=["greedy", "beams", "int8"])
def test_contrastive_decoding(model, tokenizer, options) -> None:
    amateur = model_of(tokenizer, 7)
    ids, mask = torch.tensor([[40, 50, 60], [90, 30, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = generate_ids(model, ids, mask, 8, stop=[], amateur=amateur, amateur_alpha=0.05, **options)
    assert not torch.equal(found, generate_ids(model, ids, mask, 8, stop=[], **options))
    if options:
        assert found.shape == (2, 8)
        return
    for row, prompt in zip(found.tolist(), ([40, 50, 60], [90, 30]), strict=True):
        text = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                expert, other = (each(input_ids=torch.tensor([text])).logits[:, -1] for each in (model, amateur))
            text.append(int(contrast(expert, other, 0.05).argmax()))
        assert row == text[len(prompt) :]


def test_an_amateur_of_another_family_is_refused(model) -> None:
    with pytest.raises(ValueError, match="amateur: its tokenizer is another"):
        generate_ids(model, torch.tensor([[40]]), amateur=model_of(tiny_tokenizer(320), 0))
    with pytest.raises(ValueError, match="amateur"):
        generate_ids(model, torch.tensor([[40]]), amateur=model, draft="lookup")
