"""Alignment against the formulas of the papers, written as loops."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mm.datasets.packing import collate
from mm.decoder.ffn.balance import Balance
from mm.model import EmbeddingHead, MultimodalModel
from mm.objectives.align import Align, contrastive_loss, embed_pairs
from mm.objectives.base import next_token_loss
from mm.testing import picture, sample_batch, tiny_model
from mm.types import IGNORE, Sample

LM_ALONE = Balance(switch=0, z=0)


def captioned(key: str, seed: int, text: str) -> Sample:
    user = {"role": "user", "content": [{"type": "image", "media": 0}]}
    return Sample(key, [user, {"role": "assistant", "content": text}], [picture(seed, (4 + 2 * (seed % 3), 4))])


SAMPLES = [captioned("a", 1, "red"), captioned("b", 2, "a green shape"), captioned("c", 3, "two blue"),
           captioned("d", 4, "green")]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    return tiny_model(embedding_dim=8).train()


def vectors(pairs: int) -> tuple[EmbeddingHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    media, text = (F.normalize(torch.randn(pairs, 5, generator=generator), dim=-1) for _ in range(2))
    return EmbeddingHead(4, 5, initial_scale=3.0, initial_shift=-0.5), media, text


def ids_of(*texts: list[int]) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([text + [IGNORE] * (longest - len(text)) for text in texts])


def test_infonce() -> None:
    head, media, text = vectors(4)
    loss = contrastive_loss(head, media, text, ids_of([1], [1, 2], [2, 1], [3]))
    total = 0.0
    for i in range(4):  # CLIP, figure 3: each media item among all texts, each text among all media
        to_text = [math.exp(3 * float(media[i] @ text[j])) for j in range(4)]
        to_media = [math.exp(3 * float(media[j] @ text[i])) for j in range(4)]
        total -= math.log(to_text[i] / sum(to_text)) + math.log(to_media[i] / sum(to_media))
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)


def test_sigmoid() -> None:
    head, media, text = vectors(4)
    loss = contrastive_loss(head, media, text, ids_of([1], [2], [3], [4]), sigmoid=True)
    total = 0.0
    for i in range(4):  # SigLIP, equation 1: every pair is a yes/no question
        for j in range(4):
            z = 1 if i == j else -1
            total -= math.log(1 / (1 + math.exp(-z * (3 * float(media[i] @ text[j]) - 0.5))))
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_same_text_is_a_match_and_not_a_negative(sigmoid: bool) -> None:
    head, media, text = vectors(3)
    ids = ids_of([7, 8], [7], [7, 8])
    loss = contrastive_loss(head, media, text, ids, sigmoid).item()
    logits = 3 * media @ text.T
    same = [[0, 2], [1], [0, 2]]
    if sigmoid:
        terms = [F.logsigmoid((1 if j in same[i] else -1) * (logits[i, j] - 0.5)) for i in range(3) for j in range(3)]
        expected = -sum(terms) / 3
    else:  # the target is shared by the matches
        rows, columns = logits.log_softmax(1), logits.log_softmax(0)
        expected = -sum((rows[i, j] + columns[j, i]) / len(same[i]) for i in range(3) for j in same[i]) / 6
    assert loss == pytest.approx(float(expected), rel=1e-5)
    negative = contrastive_loss(head, media, text, ids_of([7, 8], [7], [9]), sigmoid).item()
    assert loss != pytest.approx(negative, rel=1e-2)


def test_scale_stops_at_a_hundred() -> None:
    head, media, text = vectors(3)
    ids = ids_of([1], [2], [3])
    head.log_scale.data.fill_(math.log(100.0))
    at_limit = contrastive_loss(head, media, text, ids)
    head.log_scale.data.fill_(9.0)
    torch.testing.assert_close(contrastive_loss(head, media, text, ids), at_limit, rtol=1e-3, atol=1e-4)


def test_pairs_are_each_media_item_and_its_own_text(model: MultimodalModel) -> None:
    """Packed in whatever rows, a pair is what it is alone."""
    head = model.embedding_head
    assert head is not None
    batch = sample_batch(model, [[SAMPLES[1], SAMPLES[0]], [SAMPLES[2]]])
    media, text, ids = embed_pairs(model, batch, model.encode_media(batch))
    assert media.shape == text.shape == (3, 8)
    for i, sample in enumerate([SAMPLES[1], SAMPLES[0], SAMPLES[2]]):
        spoken = model.tokenizer.encode(str(sample.messages[1]["content"])) + [model.tokenizer.special("<|end|>")]
        assert [token for token in ids[i].tolist() if token != IGNORE] == spoken
        alone = sample_batch(model, [[sample]])
        # sums of float32 in another order: unit vectors move by some 1e-7
        features = model.encode_media(alone)
        torch.testing.assert_close(media[i], head.embed_media(features["image"])[0], atol=1e-5, rtol=1e-4)
        hidden = model(input_ids=torch.tensor([spoken])).hidden
        expected = head.embed_text(hidden, torch.ones(1, len(spoken), dtype=torch.bool))[0]
        torch.testing.assert_close(text[i], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid", "none"])
def test_loss_is_the_sum_of_its_parts(model: MultimodalModel, kind: Literal["infonce", "sigmoid", "none"]) -> None:
    batch = sample_batch(model, [[SAMPLES[0], SAMPLES[1]], [SAMPLES[2], SAMPLES[3]]])
    loss = Align(kind, captioning=0.5, balance=Balance(switch=0.1, z=0))(model, batch)
    assert loss.count == 4  # pairs
    caption, tokens, right = next_token_loss(model(batch))
    torch.testing.assert_close(loss.parts["caption"], caption.detach() / tokens)
    torch.testing.assert_close(loss.parts["accuracy"], right / tokens)
    expected = 0.5 * loss.parts["caption"] + loss.parts["balance/switch"]
    if kind == "none":
        assert "contrastive" not in loss.parts
    else:
        assert model.embedding_head is not None
        pairs = embed_pairs(model, batch, model.encode_media(batch))
        plain = contrastive_loss(model.embedding_head, *pairs, sigmoid=kind == "sigmoid")
        torch.testing.assert_close(loss.parts["contrastive"], plain.detach())
        expected = expected + plain.detach()
    torch.testing.assert_close(loss.total.detach() / loss.count, expected)


def test_gradients_reach_head_tower_and_decoder(model: MultimodalModel) -> None:
    model.zero_grad()
    batch = sample_batch(model, [[SAMPLES[0], SAMPLES[1], SAMPLES[2]]])
    Align("sigmoid", captioning=0, balance=LM_ALONE)(model, batch).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name.startswith(("embedding_head", "towers.image", "decoder.layers.0")):
            assert parameter.grad.any(), name
    model.zero_grad()


def test_a_rank_with_nothing_to_do(model: MultimodalModel) -> None:
    """No pairs and no loss, but through every part: other ranks' gradients pass through this one."""
    batch = collate([])
    for kind in ("infonce", "sigmoid"):
        loss = Align(kind)(model, batch)
        assert loss.count == 0 and loss.total == 0 and loss.total.requires_grad
    media, text, ids = embed_pairs(model, batch, model.encode_media(batch))
    assert media.shape == text.shape == (0, 8) and len(ids) == 0
    assert media.requires_grad and text.requires_grad


def test_what_alignment_needs(model: MultimodalModel) -> None:
    batch = sample_batch(model, [[SAMPLES[0]]])
    with pytest.raises(ValueError, match="embedding_dim"):
        Align()(tiny_model(), batch)
    assert Align("none")(tiny_model(), batch).count == 1
    chat = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "two"}]
    with pytest.raises(ValueError, match="one media item and an assistant text"):
        Align()(model, sample_batch(model, [[Sample("text", chat)]]))
