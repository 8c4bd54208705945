"""Latent attention: the absorbed path, its cache, the model around it (families compare it with the published one)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm.decoder.attention.latent import LatentAttention
from mm.decoder.cache import Cache
from mm.decoder.layout import Layout, Places
from mm.testing import finite_nonzero_gradients, model_batch, tiny_decoder, tiny_media, tiny_model

WIDTH = 20
SIZES: dict[str, Any] = {"heads": 3, "kv_rank": 7, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}


@pytest.fixture(params=[None, 9], ids=["q straight", "q rank"])
def mixer(request: pytest.FixtureRequest) -> LatentAttention:
    torch.manual_seed(0)
    mixer = LatentAttention(WIDTH, **SIZES, q_rank=request.param, bias=request.param is not None, scale=0.4)
    for name, parameter in mixer.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.4)
    return mixer.eval()


def layout(length: int, past: int = 0, pad: int = 0) -> Layout:
    """Two rows, one document each, the second with `pad` places of padding before it."""
    documents = torch.ones(2, past + length, dtype=torch.long)
    documents[1, :pad] = 0
    index = torch.arange(past + length).expand(2, -1) - torch.tensor([[0], [pad]])
    keys = Places(index.clamp(min=0), documents, torch.zeros_like(documents))
    queries = Places(*(part[:, past:] for part in (keys.index, keys.document_ids, keys.branch_ids)))
    return Layout(queries, keys, queries.index[..., None].expand(-1, -1, 3))


def close(actual: Tensor, expected: Tensor) -> None:
    """float32 sums of tens of terms in another order: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("pieces", [[11], [5, 6], [8, 1, 1, 1]])
def test_both_paths_are_the_same(
    mixer: LatentAttention, absorb: bool, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, sum(pieces), WIDTH)
    monkeypatch.setattr(mixer, "_absorbing_is_cheaper", lambda layout: False)
    whole = mixer(x, layout(len(x[0]), pad=2))
    monkeypatch.setattr(mixer, "_absorbing_is_cheaper", lambda layout: absorb)
    cache, parts, done = Cache(1), [], 0
    for piece in x.split(pieces, 1):
        parts.append(mixer(piece, layout(piece.shape[1], done, pad=2), cache, 0))
        done += piece.shape[1]
    real = layout(len(x[0]), pad=2).queries.document_ids > 0
    close(torch.cat(parts, 1)[real], whole[real])
    # The latent and the rotated key, not the heads: 7 + 4 numbers a token, where the heads are 3 * (6 + 4 + 5).
    assert {name: tuple(kept.shape) for name, kept in cache.layers[0].items()} == {
        "latent": (2, done, 7),
        "rope_key": (2, done, 4),
    }
    assert cache.bytes() == 4 * 2 * done * mixer.cache_numbers_per_token()


def test_gradients_are_the_same_on_both_paths(mixer: LatentAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6, WIDTH)
    found = []
    for absorb in (False, True):
        monkeypatch.setattr(mixer, "_absorbing_is_cheaper", lambda layout, absorb=absorb: absorb)
        mixer.zero_grad()
        mixer(x, layout(6)).square().sum().backward()
        found.append(finite_nonzero_gradients(mixer))
    for name, grad in found[0].items():
        close(found[1][name], grad)


def test_deepseek_v3_decodes_absorbed_and_reads_prompts_expanded() -> None:
    """By the count of products: a step over a long context, but not a chunk of hundreds of tokens."""
    with torch.device("meta"):
        mixer = LatentAttention(7168, heads=128, q_rank=1536)
    assert mixer.cache_numbers_per_token() == 576
    assert mixer.attention_flops(1000) == 2 * 128 * (128 + 64 + 128) * 1000

    def cheaper(length: int, past: int) -> bool:
        return mixer._absorbing_is_cheaper(layout(length, past))

    assert cheaper(1, 4000) and cheaper(4, 4000)
    assert not cheaper(4000, 0) and not cheaper(500, 3500)
    assert sum(p.numel() for p in mixer.parameters()) == 187_107_328  # of DeepSeek-V3, a layer


def test_in_a_decoder_and_in_a_multimodal_model() -> None:
    """Packed documents, media positions on three axes, and generation through the cache."""
    torch.manual_seed(0)
    mixer = partial(LatentAttention, **SIZES)
    decoder = tiny_decoder(width=WIDTH, mixer=mixer)
    assert decoder.new_cache().bytes() == 0
    model = tiny_model().eval()
    model.decoder = tiny_decoder(width=32, mixer=mixer, vocab_size=model.decoder.vocab_size).eval()
    media = {"image": [tiny_media(model, "image", (1, 4, 4))]}
    with torch.no_grad():
        out = model(model_batch(model, [[(1, 0, "20"), (1, 0, "image"), (1, 0, "21")]], media))
        ids = torch.randint(0, 90, (2, 6))
        new = model.generate(ids, max_new_tokens=5, temperature=0.0, stop=())
        full = model(input_ids=torch.cat([ids, new], 1)).logits.argmax(-1)
    assert torch.isfinite(out.logits).all()
    assert torch.equal(full[:, 5:-1], new)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"rope_dim": 5}, "rope_dim 5"), ({"kv_rank": 0}, "kv_rank must be positive, not 0"), ({"heads": -1}, "heads")],
)
def test_what_a_config_can_get_wrong(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LatentAttention(WIDTH, **(SIZES | arguments))
