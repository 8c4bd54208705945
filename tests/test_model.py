"""The whole model with tiny towers: the same path for every batch, no leaks, and a cache that changes nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mm.decoder.decoder import Decoder
from mm.encoders.timm_vision import TimmEncoder
from mm.encoders.transformer import TransformerEncoder
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import LinearProjector, MLPProjector
from mm.fusion.resampler import PerceiverResampler
from mm.model import EmbeddingHead, MultimodalModel, TowerConfig
from mm.testing import model_batch, tiny_decoder, tiny_media, tiny_model, tiny_tokenizer
from mm.tokenizers.image import ImageTokenizer
from mm.types import SLOT_IDS, BridgeFactory, EncoderFactory

BRIDGES: dict[str, BridgeFactory] = {
    "linear": LinearProjector,
    "mlp": partial(MLPProjector, shuffle=(1, 2, 2)),
    "resampler": partial(PerceiverResampler, queries=3, layers=1, heads=4),
    "cross": GatedCrossAttentionBridge,
    "cross resampled": partial(GatedCrossAttentionBridge, queries=3, layers=1, heads=4),
}
Row = list[tuple[int, int, str]]


def close(actual: Tensor, expected: Tensor) -> None:
    """Float32 products add in an order that depends on the batch's shape: logits of order 1 move by some 1e-6."""
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def row(text: str) -> Row:
    """ "1:20 1:image 1.2:30" -> elements (document, branch, text id or kind)."""
    elements = []
    for word in text.split():
        place, element = word.split(":")
        document, _, branch = place.partition(".")
        elements.append((int(document), int(branch or 0), element))
    return elements


@pytest.fixture(params=BRIDGES)
def model(request: pytest.FixtureRequest) -> MultimodalModel:
    return tiny_model(BRIDGES[request.param], embedding_dim=8).eval()


def test_text_alone_gives_unused_parts_zero_gradients_not_missing_ones(model: MultimodalModel) -> None:
    model.train()
    output = model(model_batch(model, [row("1:20 1:21 2:22"), row("1:23")]))
    output.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name}: distributed training would wait for this gradient forever"
        if name.startswith(("towers.", "embedding_head.", "slots.")) or ".cross." in name:
            assert not parameter.grad.any(), name
    assert model.decoder.embed.weight.grad is not None and model.decoder.embed.weight.grad.any()


def test_one_kind_of_media_reaches_its_tower_and_no_other(model: MultimodalModel) -> None:
    batch = model_batch(model, [row("1:20 1:audio 1:21")], {"audio": [tiny_media(model, "audio", (9, 1, 1))]})
    model(batch).logits.square().sum().backward()
    for kind in model.towers:
        moved = any(p.grad is not None and bool(p.grad.any()) for p in model.tower(kind).bridge.parameters())
        assert moved == (kind == "audio"), kind


def test_zero_media_change_nothing(model: MultimodalModel) -> None:
    """The path through empty towers gives exactly the logits of a model that has no towers."""
    bare = MultimodalModel(model.tokenizer, model.decoder)
    batch = model_batch(model, [row("1:20 1:21 1:22")])
    assert torch.equal(model(batch).logits, bare(batch).logits)


def test_media_without_a_tower_names_the_item() -> None:
    model = tiny_model()
    batch = model_batch(model, [row("1:image")], {"image": [tiny_media(model, "image", (1, 2, 2))]})
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="sample 0: image 0: this model reads text only, not image"):
        MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size))(batch)


@pytest.mark.parametrize("left", [False, True])
def test_padded_text_keeps_its_columns_and_logits(left: bool) -> None:
    model = tiny_model().eval()
    rows = [torch.randint(10, 250, (n,)) for n in (6, 3, 1)]
    ids, mask = torch.full((3, 8), 7), torch.zeros(3, 8, dtype=torch.long)  # two columns hold padding alone
    for i, tokens in enumerate(rows):
        columns = slice(8 - len(tokens), 8) if left else slice(0, len(tokens))
        ids[i, columns], mask[i, columns] = tokens, 1
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (3, 8, model.decoder.vocab_size) and torch.isfinite(logits).all()
    for i, tokens in enumerate(rows):
        close(logits[i, mask[i].bool()], model(input_ids=tokens[None]).logits[0])


def test_batch_padding_and_order_change_nothing(model: MultimodalModel) -> None:
    media = [tiny_media(model, "image", (1, 2, 3), 1), tiny_media(model, "image", (1, 4, 4), 2)]
    rows = [row("1:20 1:image 1:21"), row("1:22 1:23 1:image 1:24 1:25 1:26")]
    together = model(model_batch(model, rows, {"image": media}))
    swapped = model(model_batch(model, rows[::-1], {"image": media[::-1]}))
    for i in range(2):
        alone = model(model_batch(model, [rows[i]], {"image": [media[i]]})).logits[0]
        close(together.logits[i, together.sequence.mask[i]], alone)
        close(swapped.logits[1 - i, swapped.sequence.mask[1 - i]], alone)


def test_packed_samples_with_images_never_leak(model: MultimodalModel) -> None:
    """Another image in sample A, or in one branch of B: what must not see it does not move, what must see it does."""
    rows = [row("1:20 1:image 1:21 1:22 2:23 2:image 2:24 2.1:image 2.1:25 2.2:26 2.2:27 3:28")]
    media = [tiny_media(model, "image", (1, 2, 2), seed) for seed in (1, 2, 3)]

    def run(items: list) -> tuple[Tensor, Tensor, Tensor]:
        output = model(model_batch(model, rows, {"image": items}))
        return output.logits[0], output.sequence.document_ids[0], output.sequence.branch_ids[0]

    before, document, branch = run(media)
    other_a, *_ = run([tiny_media(model, "image", (1, 2, 2), 9), *media[1:]])
    close(other_a[document != 1], before[document != 1])
    assert (other_a - before)[document == 1][-1].abs().max() > 1e-2
    other_branch, *_ = run([*media[:2], tiny_media(model, "image", (1, 2, 2), 9)])
    unseen = (document != 2) | (branch != 1)
    close(other_branch[unseen], before[unseen])
    assert (other_branch - before)[~unseen][-1].abs().max() > 1e-2


def test_cached_steps_equal_the_full_pass_on_ragged_rows(model: MultimodalModel) -> None:
    media = {
        "image": [tiny_media(model, "image", (1, 2, 3), 1), tiny_media(model, "image", (1, 2, 2), 2)],
        "video": [tiny_media(model, "video", (2, 2, 2), 3)],
    }
    prompts = [row("1:20 1:image 1:21 1:image"), row("1:22 1:23"), row("1:24 1:video 1:25 1:26 1:27")]
    answers = torch.randint(10, 250, (3, 4))
    longer = [p + [(1, 0, str(i)) for i in ids.tolist()] for p, ids in zip(prompts, answers, strict=True)]
    full = model(model_batch(model, longer, media))
    ends = full.sequence.mask.sum(1)

    cache = model.new_cache()
    prompt = model(model_batch(model, prompts, media), cache=cache)
    steps = [prompt.logits[torch.arange(3), prompt.sequence.mask.sum(1) - 1]]
    steps += [model.step(ids, cache) for ids in answers.T]
    for i in range(3):
        close(torch.stack([step[i] for step in steps]), full.logits[i, ends[i] - 5 : ends[i]])

    cache = model.new_cache()  # and rows may leave on the way
    model(model_batch(model, prompts, media), cache=cache)
    model.step(answers[:, 0], cache)
    cache.keep(torch.tensor([2, 0]))
    close(model.step(answers[[2, 0], 1], cache), steps[2][[2, 0]])


def test_left_padded_prompt_goes_on_as_the_unpadded_one() -> None:
    model = tiny_model().eval()
    ids, mask = torch.tensor([[7, 7, 20, 21], [22, 23, 24, 25]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    padded, alone = model.new_cache(), model.new_cache()
    close(
        model(input_ids=ids, attention_mask=mask, cache=padded).logits[0, 2:],
        model(input_ids=ids[:1, 2:], cache=alone).logits[0],
    )
    for token in (30, 31):
        close(model.step(torch.tensor([token, 40]), padded)[0], model.step(torch.tensor([token]), alone)[0])


def test_a_batch_to_be_continued_holds_one_sample_a_row() -> None:
    model = tiny_model().eval()
    for text in ("1:20 2:21", "1:20 1.1:21"):
        with pytest.raises(ValueError, match="one sample a row"):
            model(model_batch(model, [row(text)]), cache=model.new_cache())


def test_encoder_of_shares_the_encoder_and_not_the_bridge() -> None:
    model = tiny_model()
    image, video = model.tower("image"), model.tower("video")
    assert image.encoder is video.encoder and image.bridge is not video.bridge
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("towers.video.encoder") for name in names)  # counted once, under its first name
    batch = model_batch(model, [row("1:video 1:20")], {"video": [tiny_media(model, "video", (2, 1, 1))]})
    model(batch).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in image.encoder.embed.parameters())


def test_what_a_config_can_get_wrong() -> None:
    tokenizer = tiny_tokenizer()
    image = ImageTokenizer(patch=2)

    def build(**towers: TowerConfig) -> MultimodalModel:
        return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size), towers)

    with pytest.raises(ValueError, match="towers.image: give either encoder or encoder_of"):
        build(image=TowerConfig(image, LinearProjector))
    with pytest.raises(ValueError, match="towers.video.encoder_of names 'image'; a tower above"):
        build(video=TowerConfig(image, LinearProjector, encoder_of="image"))
    with pytest.raises(ValueError, match="towers has 'smell'; the kinds are image, audio, video"):
        build(smell=TowerConfig(image, LinearProjector, encoder_of="image"))
    with pytest.raises(ValueError, match="decoder.vocab_size 97 is below the tokenizer's"):
        MultimodalModel(tokenizer, tiny_decoder(vocab_size=97))


def test_text_ids_must_be_text() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"-1 \(the slot of image\)"):
        model(input_ids=torch.tensor([[20, SLOT_IDS["image"]]]))
    with pytest.raises(ValueError, match="-100; text ids"):
        model(input_ids=torch.tensor([[20, -100]]))
    with pytest.raises(ValueError, match="needs a batch or input_ids"):
        model()


def test_the_tokenizer_sets_the_decoders_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    decoder = tiny_decoder(vocab_size=None)
    assert isinstance(decoder, Decoder) and not hasattr(decoder, "embed")
    model = MultimodalModel(tokenizer, decoder)
    assert model.decoder.vocab_size == tokenizer.vocab_size and model.device == torch.device("cpu")
    assert model(input_ids=torch.tensor([[20, 21]])).logits.dtype == torch.float32


def test_embeddings_are_unit_means_without_padding() -> None:
    head = EmbeddingHead(4, 3)
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    vectors = head.embed_text(hidden, mask)
    close(vectors.norm(dim=-1), torch.ones(2))
    close(vectors[1], torch.nn.functional.normalize(head.text(hidden[1, :2].mean(0)), dim=-1))


def test_media_embeddings_do_not_feel_the_batch(model: MultimodalModel) -> None:
    head = model.embedding_head
    assert head is not None
    items = [tiny_media(model, "image", (1, 2, 3), 1), tiny_media(model, "image", (1, 4, 4), 2)]
    batch = model_batch(model, [row("1:image"), row("1:image")], {"image": items})
    both = head.embed_media(model.encode_media(batch)["image"])
    alone = model_batch(model, [row("1:image")], {"image": items[:1]})
    close(both[:1], head.embed_media(model.encode_media(alone)["image"]))
    close(both.norm(dim=-1), torch.ones(2))


def frozen_model(encoder: EncoderFactory, freeze: bool) -> MultimodalModel:
    """A tiny model with this encoder of 8-pixel patches; `freeze`: all of it but the encoder learns."""
    torch.manual_seed(0)
    tower = TowerConfig(ImageTokenizer(patch=8, max_tokens=16), LinearProjector, encoder)
    tokenizer = tiny_tokenizer()
    model = MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size), {"image": tower})
    model.tower("image").encoder.requires_grad_(not freeze)
    return model.train()


ENCODERS: dict[str, EncoderFactory] = {
    "transformer": partial(TransformerEncoder, width=16, layers=1, heads=2),
    "batch norm": partial(TimmEncoder, name="test_resnet", layer=-3),
    "dropout": partial(TimmEncoder, name="test_vit", options={"img_size": 32, "patch_size": 8, "proj_drop_rate": 0.5}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_frozen_encoder_keeps_no_graph_and_changes_no_gradient_of_what_learns(name: str) -> None:
    model = frozen_model(ENCODERS[name], freeze=True)
    encoder = model.tower("image").encoder
    assert model.training and not any(part.training for part in encoder.modules())
    batch = model_batch(model, [row("1:20 1:image 1:21")], {"image": [tiny_media(model, "image", (1, 4, 4))]})
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    tokens, kept = batch.media["image"].tokens, list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = model.tower("image").encode(tokens)
    assert not kept and not out.values.requires_grad and out.values.grad_fn is None
    found = []
    for graph in (False, True):  # as it is, and with the graph that it would keep if its weights learned
        encoder.requires_grad_(graph)
        model.zero_grad()
        loss = model(batch).logits.square().mean()
        loss.backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        assert graph == any(key.startswith("towers.image.encoder") for key in grads)
        found.append((loss.detach(), {key: grad for key, grad in grads.items() if ".encoder." not in key}))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    assert any(grad.any() for key, grad in found[0][1].items() if key.startswith("towers.image.bridge"))
    for key, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][key]), key
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), f"{key}: statistics of a frozen batch norm moved"


def test_an_encoder_that_learns_is_trained_as_ever_and_one_may_be_asked_for_gradients_of_its_input() -> None:
    model = frozen_model(ENCODERS["transformer"], freeze=False)
    assert all(part.training for part in model.tower("image").modules())
    batch = model_batch(model, [row("1:20 1:image 1:21")], {"image": [tiny_media(model, "image", (1, 4, 4))]})
    model(batch).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.tower("image").encoder.parameters())
    frozen = frozen_model(ENCODERS["transformer"], freeze=True)
    pixels = batch.media["image"].tokens.values.float().requires_grad_()
    batch.media["image"].tokens.values = pixels
    frozen(batch).logits.square().mean().backward()
    assert pixels.grad is not None and pixels.grad.any()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_batch_without_items_leaves_a_frozen_encoder_alone_and_what_learns_with_zeros(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen_model(ENCODERS[name], freeze=True)
    monkeypatch.setattr(type(model.tower("image").encoder), "forward", None)
    model(model_batch(model, [row("1:20 1:21")])).logits.square().sum().backward()
    for key, parameter in model.tower("image").bridge.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key
