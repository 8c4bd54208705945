"""Decoding with the real model, tiny and random: its cache, its padding and its media, through the engine."""

import pytest
import torch

from mm.datasets.chat_template import ChatTemplate
from mm.encoders.none import NoEncoder
from mm.fusion.projector import LinearProjector
from mm.generation import generate, generate_ids, stream
from mm.generation.requests import encode_requests
from mm.model import MultimodalModel, TowerConfig
from mm.testing import tiny_decoder
from mm.tokenizers.image import ImageTokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    towers = {"image": TowerConfig(ImageTokenizer(patch=2, max_tokens=16), LinearProjector, NoEncoder)}
    model = MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size), towers)
    model.template = ChatTemplate("compact")  # type: ignore[assignment]
    return model.eval()


@pytest.fixture
def samples(ask):
    texts = ["red?", "what colour is the shape?", "is it blue? " * 5, "green or red"]
    return [ask(text, f"q{i}", image) for i, (text, image) in enumerate(zip(texts, [3, None, 5, 7], strict=True))]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_a_batch_gives_each_request_what_it_gets_alone(model, samples, options):
    together = generate(model, samples, max_new_tokens=10, **options)
    assert together == [generate(model, [sample], max_new_tokens=10, **options)[0] for sample in samples]
    assert len({tuple(answer.ids) for answer in together}) == len(samples)
    assert ["".join(stream(model, sample, max_new_tokens=10, **options)) for sample in samples] == [
        answer.text for answer in together
    ]


def test_cached_decoding_gives_the_logits_of_reading_everything_anew(model, samples):
    """Teacher-forced: what `generate` chose is what the model prefers when it reads it all without a cache."""
    for sample, answer in zip(samples, generate(model, samples, max_new_tokens=10), strict=True):
        (request,) = encode_requests(model, [sample], 0, 10, None)
        if request.encoded.media:
            continue
        ids = torch.cat([request.encoded.ids, torch.tensor(answer.ids)])[None]
        logits = model(input_ids=ids).logits[0, len(request.encoded.ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.ids


def test_batched_logits_are_the_single_ones(model):
    together = torch.tensor([[20, 30, 40, 50], [60, 70, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    cache, alone = model.new_cache(), model.new_cache()
    with torch.inference_mode():
        model(input_ids=together, attention_mask=mask, cache=cache)
        model(input_ids=torch.tensor([[60, 70]]), cache=alone)
        for token in (80, 90, 100):
            batched = model.step(torch.tensor([55, token]), cache)[1]
            single = model.step(torch.tensor([token]), alone)[0]
            # Matrix products add in another order when a batch has another shape: float32, values of order 1.
            torch.testing.assert_close(batched, single, rtol=1e-5, atol=2e-5)


def test_the_models_own_generate(model):
    ids = torch.tensor([[20, 30, 40], [0, 60, 70]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert torch.equal(model.generate(ids, mask, max_new_tokens=6), generate_ids(model, ids, mask, max_new_tokens=6))
