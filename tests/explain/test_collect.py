"""What `explain` writes down, held to the same maths written out: media in the sequence, beside it, resampled."""

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.decoder.attention.grouped import GroupedAttention, Scores
from mm.decoder.attention.latent import LatentAttention
from mm.decoder.attention.linear import LinearAttention
from mm.decoder.positions import Alibi
from mm.explain import collect
from mm.explain.recorder import Recorder, rollout
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import LinearProjector, MLPProjector
from mm.fusion.resampler import PerceiverResampler
from mm.generation import generate
from mm.model import MultimodalModel
from mm.testing import picture, spread, tiny_decoder, tiny_model, tiny_tokenizer
from mm.types import Sample

QUESTION = "what color is the shape?"


def explain(*args, **options) -> Any:
    return collect.explain(*args, **options)


def layers_of(model) -> Any:
    return model.decoder.layers


def asking(size=(8, 6), images=1) -> Sample:
    media = [picture(seed, size) for seed in range(images)]
    parts = [{"type": "image", "media": i} for i in range(images)]
    return Sample("a", [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}], media)


def text_model(**options) -> MultimodalModel:
    tokenizer = tiny_tokenizer()
    return spread(MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size, **options), {})).eval()


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return tiny_model(LinearProjector).eval()


@pytest.fixture(scope="module")
def found(model):
    return explain(model, asking(), max_new_tokens=5)


def test_the_answer_is_the_models_own_and_its_tokens_are_the_likeliest(model, found):
    [own] = generate(model, [asking()], max_new_tokens=5)
    assert found.answer == own.text
    assert len(found.steps) == len(own.ids) + (own.finish_reason == "stop")
    for step in found.steps:
        assert step.text == step.top[0][0] and step.probability == pytest.approx(step.top[0][1])
        assert [p for _, p in step.top] == sorted((p for _, p in step.top), reverse=True)
        assert sum(p for _, p in step.top) <= 1 + 1e-5


def test_probabilities_are_those_of_decoding(model, found):
    [own] = generate(model, [asking()], max_new_tokens=5, logprobs=1)
    assert own.logprobs is not None
    for step, likely in zip(found.steps, own.logprobs, strict=False):
        assert step.probability == pytest.approx(torch.tensor(likely.logprob).exp().item(), rel=1e-4)


def test_attention_adds_up_to_one_and_never_looks_ahead(found):
    assert [a.layer for a in found.attention] == [0, 1]
    for attention in found.attention:
        assert attention.weights.shape == (len(found.steps), len(found.positions))
        assert torch.allclose(attention.weights.sum(1), torch.ones(len(found.steps)), atol=1e-5)
        for step, weights in zip(found.steps, attention.weights, strict=True):
            assert torch.all(weights[step.column + 1 :] == 0) and torch.all(weights[: step.column + 1] > 0)


def test_positions_say_what_stands_where(model, found):
    [item] = found.media
    assert (item.grid, item.cells, item.inline) == ((1, 4, 3), (1, 4, 3), True)
    assert [p.media for p in found.positions[item.start : item.stop]] == [0] * 12
    assert QUESTION in "".join(p.text for p in found.positions if p.part == "prompt")
    answer = [p.text for p in found.positions if p.part == "answer"]
    assert answer and answer == [step.text for step in found.steps[: len(answer)]]


def test_the_picture_is_what_the_model_saw(found):
    [item] = found.media
    pixels = item.picture
    assert pixels.shape == (1, 3, 8, 6) and pixels.dtype == torch.uint8
    # Not resized: 8 x 6 pixels are 4 x 3 patches of 2.
    exact = np.asarray(Image.open(io.BytesIO(bytes(picture(0, (8, 6)).data))).convert("RGB"))
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(exact.copy()))


def test_cells_are_the_attention_on_the_image(found):
    for attention in found.attention:
        cells, share = found.cells(attention.weights, attention.of, 0), found.share(attention.weights, attention.of, 0)
        assert cells.shape == (len(found.steps), 1, 4, 3)
        assert torch.allclose(cells.sum((1, 2, 3)), share, atol=1e-6)
        item = found.media[0]
        assert torch.allclose(cells[0].flatten(), attention.weights[0, item.start : item.stop])


def written_out(mixer: GroupedAttention, x, layout) -> torch.Tensor:
    """(B, H, T, T) softmax of a mixer's own queries and keys."""
    q, k, _ = mixer._queries_keys_values(x)
    q, k = mixer.positions.rotate(q, k, layout) if mixer.positions is not None else (q, k)
    k = k.repeat_interleave(mixer.heads // mixer.kv_heads, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * mixer.scale
    if mixer.softcap is not None:
        scores = mixer.softcap * torch.tanh(scores / mixer.softcap)
    slopes = None if mixer.positions is None else mixer.positions.slopes(mixer.heads, scores.device)
    if slopes is not None:
        distance = layout.queries.index[:, :, None] - layout.keys.index[:, None]
        scores = scores - slopes[:, None, None] * distance[:, None]
    length = x.shape[1]
    places = torch.arange(length)
    seen = places[None] <= places[:, None]
    if isinstance(mixer.window, int):
        seen &= places[:, None] - places[None] < mixer.window
    scores = scores.masked_fill(~seen, float("-inf"))
    if mixer.sinks is None:
        return scores.softmax(-1)
    sink = mixer.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize(
    "mixer",
    [
        partial(GroupedAttention, heads=4, kv_heads=2),
        partial(GroupedAttention, heads=4, positions=Alibi(), window=3),
        partial(GroupedAttention, heads=2, scores=Scores(softcap=2.0, sinks=True)),
        partial(GroupedAttention, heads=4, qk_norm=True, backend="flex"),
    ],
)
@torch.inference_mode()
def test_attention_matches_a_written_out_softmax(mixer):
    torch.manual_seed(1)
    model = text_model(mixer=mixer)
    ids = torch.randint(10, 200, (1, 9))
    columns = torch.tensor([2, 8])
    expected = {}

    def watch(part, args, number):
        expected[number] = written_out(part, args[0], args[1]).mean(1)[0]

    hooks = [
        layer.mixer.register_forward_pre_hook(lambda part, args, n=n: watch(part, args, n))
        for n, layer in enumerate(layers_of(model))
    ]
    with Recorder(model, columns) as seen:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    assert sorted(seen.own) == [0, 1] and not seen.squares
    for number, weights in seen.own.items():
        assert torch.allclose(weights, expected[number][columns], atol=1e-5)


@torch.inference_mode()
def test_recording_changes_nothing_and_leaves_nothing_behind():
    model = text_model()
    ids = torch.randint(10, 200, (1, 9))
    before = model(input_ids=ids).logits
    backends = [layer.mixer.attend for layer in layers_of(model)]
    with pytest.raises(RuntimeError), Recorder(model, torch.tensor([3])):
        assert torch.equal(model(input_ids=ids).logits, before)
        raise RuntimeError("an error on the way")
    assert [layer.mixer.attend for layer in layers_of(model)] == backends
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_latent_attention_shows_and_linear_attention_is_said_to_have_none():
    latent = partial(LatentAttention, heads=2, kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8)
    found = explain(text_model(mixer=latent), Sample("t", [{"role": "user", "content": "red?"}]), max_new_tokens=3)
    assert all(torch.allclose(a.weights.sum(1), torch.ones(len(found.steps)), atol=1e-5) for a in found.attention)
    linear = text_model(mixer=partial(LinearAttention, heads=4))
    found = explain(linear, Sample("t", [{"role": "user", "content": "red?"}]), max_new_tokens=3)
    assert found.attention == [] and found.rollout is None
    assert "2 of 2 layers have no attention" in found.notes[0]


def test_routing_is_the_models_own(model, found):
    assert [routing.layer for routing in found.routing] == [1]  # the first layer is dense
    [routing] = found.routing
    assert routing.experts == 4 and routing.indices.shape == (len(found.positions), 2)
    chosen = routing.of(found.steps[0].column)
    assert len(chosen) == 2 and chosen[0][1] >= chosen[1][1]
    assert sum(weight for _, weight in chosen) == pytest.approx(1.0, abs=1e-5)


def test_rollout_adds_up_and_matches_the_product(found):
    assert torch.allclose(found.rollout.sum(1), torch.ones(len(found.steps)), atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    layers = {n: torch.rand(5, 5, generator=generator).tril().softmax(-1) for n in range(3)}
    whole = torch.eye(5)
    for n in range(3):
        whole = (0.5 * torch.eye(5) + 0.5 * layers[n]) @ whole
    assert torch.allclose(rollout(layers, torch.tensor([1, 4])), whole[[1, 4]], atol=1e-6)


def test_media_beside_the_sequence():
    model = tiny_model(GatedCrossAttentionBridge).eval()
    found = explain(model, asking(images=2), max_new_tokens=4)
    assert [(item.inline, item.start, item.stop) for item in found.media] == [(False, 0, 12), (False, 12, 24)]
    beside = [a for a in found.attention if a.of == "beside"]
    assert [a.layer for a in beside] == [0] and beside[0].name == "layer 0, cross-attention"
    assert torch.allclose(beside[0].weights.sum(1), torch.ones(len(found.steps)), atol=1e-5)
    assert found.rollout is None and "beside the sequence" in found.notes[-1]
    part = layers_of(model)[0].cross
    seen = {}

    def written(module, args):
        x, layout = args
        heads = module.heads
        q = module.q(module.norm(x))[0].view(x.shape[1], heads, -1)
        k = module.kv(layout.cross.values)[0].chunk(2, -1)[0].view(-1, heads, q.shape[-1])
        seen["weights"] = torch.einsum("thd,nhd->htn", q, k).mul(q.shape[-1] ** -0.5).softmax(-1).mean(0)

    hook = part.register_forward_pre_hook(written)
    explain(model, asking(images=2), answer=found.answer or "red")
    hook.remove()
    again = explain(model, asking(images=2), answer=found.answer or "red")
    columns = [step.column for step in again.steps]
    own = next(a for a in again.attention if a.of == "beside")
    assert torch.allclose(own.weights, seen["weights"][columns], atol=1e-5)
    assert again.cells(beside[0].weights, "own", 0) is None


@pytest.mark.parametrize("bridge", [PerceiverResampler, partial(GatedCrossAttentionBridge)])
def test_a_resampler_is_seen_through(bridge):
    model = tiny_model(partial(bridge, queries=5, heads=2)).eval()
    found = explain(model, asking(), max_new_tokens=3)
    [item] = found.media
    assert item.stop - item.start == 5 and item.cells == (1, 4, 3) and item.read.shape == (5, 12)
    assert torch.allclose(item.read.sum(1), torch.ones(5), atol=1e-5)
    of = "own" if item.inline else "beside"
    attention = next(a for a in found.attention if a.of == of)
    cells = found.cells(attention.weights, of, 0)
    assert torch.allclose(cells.sum((1, 2, 3)), found.share(attention.weights, of, 0), atol=1e-5)


def test_pixel_shuffle_gives_fewer_and_larger_cells():
    model = tiny_model(partial(MLPProjector, shuffle=(1, 2, 2))).eval()
    [item] = explain(model, asking((8, 6)), max_new_tokens=2).media
    assert (item.grid, item.cells, item.stride) == ((1, 4, 3), (1, 2, 2), (1, 2, 2))


def test_an_answer_can_be_given(model):
    found = explain(model, asking(), answer="red")
    assert found.answer == "red" and "".join(step.text for step in found.steps[:-1]) == "red"
    with pytest.raises(ValueError, match="answer: it is empty"):
        explain(model, asking(), answer="")


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        explain(tiny_model(), asking())
