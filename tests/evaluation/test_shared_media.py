"""Against plain generation, on a random tiny model."""

import json
from dataclasses import replace

import pytest
import torch

from mm.datasets.chat_template import ChatTemplate
from mm.datasets.packing import collate
from mm.datasets.processor import Processor
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.moe import SparseMoE
from mm.encoders.none import NoEncoder
from mm.evaluation import shared_media
from mm.evaluation.provenance import describe
from mm.evaluation.shared_media import generate_shared
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import LinearProjector
from mm.generation.engine import generate
from mm.model import MultimodalModel, TowerConfig
from mm.tokenizers.image import ImageTokenizer
from mm.tokenizers.text import TextTokenizer
from mm.types import Sample

from .toys import ColorBenchmark, picture

QUESTIONS = ["what color is it?", "what?", "is it red or blue, and how do you know that?", "what color was it?"]


@pytest.fixture(params=[LinearProjector, GatedCrossAttentionBridge], ids=["inline", "cross"])
def model(request) -> MultimodalModel:
    torch.manual_seed(0)
    tower = TowerConfig(ImageTokenizer(patch=2, max_tokens=16), bridge=request.param, encoder=NoEncoder)
    attention, moe = (lambda w: GroupedAttention(w, heads=2)), (lambda w: SparseMoE(w, 32, num_experts=4))
    decoder = Decoder(32, {"full": attention}, {"moe": moe}, [LayerGroup(["full/moe"], 2)])
    tokenizer = TextTokenizer.train(QUESTIONS * 4, 300)
    model = MultimodalModel(tokenizer, decoder, {"image": tower}, ChatTemplate("compact")).eval()
    for parameter in model.parameters():  # a fresh model's logits are nearly equal: spread them, and open the gates
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ask(key: str, text: str, *colors: str) -> Sample:
    parts = [{"type": "image", "media": i} for i in range(len(colors))]
    return Sample(
        key, [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], [picture(c) for c in colors]
    )


def samples() -> list[Sample]:
    asked = [ask(f"{color}{i}", text, color) for i, text in enumerate(QUESTIONS) for color in ("red", "blue")]
    two = [
        ask("two0", "what?", "red", "blue"),
        ask("two1", "is it?", "red", "blue"),
        ask("swapped", "what?", "blue", "red"),
    ]
    return [*asked, ask("lone", "what?", "green"), ask("text", "what?"), *two]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_answers_are_those_of_plain_generation(model, batch_size):
    shared = generate_shared(model, samples(), max_new_tokens=5, batch_size=batch_size)
    plain = generate(model, samples(), max_new_tokens=5)
    assert [answer.text for answer in shared] == [answer.text for answer in plain]
    assert len({answer.text for answer in plain}) > 3, "the model must tell questions and pictures apart"


def test_media_are_read_once_a_group(model, monkeypatch):
    encoded: list[str] = []
    encode = shared_media.Processor.encode
    monkeypatch.setattr(
        shared_media.Processor, "encode", lambda self, s, **options: encoded.append(s.key) or encode(self, s, **options)
    )
    generate_shared(model, samples(), max_new_tokens=2, batch_size=64)
    assert sorted(encoded) == ["blue0", "lone", "red0", "swapped", "text", "two0"]


def test_confidence_is_the_probability_of_the_whole_answer(model):
    [asked] = [s for s in samples() if s.key == "lone"]
    [answer] = generate_shared(model, [asked], max_new_tokens=4, batch_size=1)
    [plain] = generate(model, [asked], max_new_tokens=4)
    ids = [*plain.ids, *([model.tokenizer.special(model.template.end)] if plain.finish_reason == "stop" else [])]
    text = replace(asked, messages=[*asked.messages])
    processor = Processor(model.tokenizer, model.template, model.media_specs())
    prompt = processor.encode(text, generation_prompt=True)
    row = torch.tensor(ids)
    whole = replace(
        prompt,
        ids=torch.cat([prompt.ids, row]),
        labels=torch.cat([prompt.labels, row]),
        branch_ids=torch.cat([prompt.branch_ids, torch.zeros_like(row)]),
        length=prompt.length + len(row),
    )
    with torch.inference_mode():
        logs = model(collate([[whole]])).logits[0, -len(row) - 1 : -1].log_softmax(-1)
    expected = logs.gather(-1, row[:, None]).sum().exp().item()
    assert answer.confidence == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_positions_bound_a_batch(model, batch_tokens):
    bounded = generate_shared(model, samples(), max_new_tokens=3, batch_size=64, batch_tokens=batch_tokens)
    assert [a.text for a in bounded] == [a.text for a in generate(model, samples(), max_new_tokens=3)]


def test_a_slot_after_the_text_is_not_shared(model):
    def trailing(key: str, text: str) -> Sample:
        content = [{"type": "text", "text": text}, {"type": "image", "media": 0}]
        return Sample(key, [{"role": "user", "content": content}], [picture("red")])

    asked = [trailing("a", "what?"), trailing("b", "is it?")]
    shared = generate_shared(model, asked, max_new_tokens=3, batch_size=8)
    assert [a.text for a in shared] == [a.text for a in generate(model, asked, max_new_tokens=3)]


def test_damaged_weights_are_named(model):
    with torch.no_grad():
        model.decoder.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="red0.*NaN"):
        generate_shared(model, samples(), max_new_tokens=2, batch_size=8)


def test_provenance_names_what_the_model_does(model):
    told = describe(model, ColorBenchmark(), ColorBenchmark().samples())
    assert told["attention_backend"] == ["sdpa"]
    assert told["precision"] == "float32"
    assert told["template"]["style"] == "compact"
    assert told["media"]["image"]["tokenizer"]["patch"] == 2
    json.dumps(told)
