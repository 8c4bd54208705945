"""What every mixer owes the decoder, for every file of configs/mixers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from mm.decoder.cache import Cache
from mm.decoder.decoder import Decoder
from mm.decoder.layout import Layout, Places
from mm.parts import build

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "mixers"
WIDTH = 64


@pytest.fixture(params=sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def mixer(request: pytest.FixtureRequest) -> Any:
    """Built as a decoder builds it: by a factory that takes the width."""
    torch.manual_seed(0)
    tree = yaml.safe_load(request.param.read_text())
    arguments = {
        "width": WIDTH,
        "mixers": {"m": tree},
        "ffns": {},
        "layers": [{"pattern": ["m/none"]}],
        "vocab_size": 9,
    }
    decoder = build({"class_path": "mm.decoder.decoder.Decoder", "init_args": arguments}, Decoder)
    part: Any = decoder.layers[0].get_submodule("mixer")
    for parameter in part.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return part.eval()


def layout(documents: list[list[int]], start: int = 0, past: Layout | None = None) -> Layout:
    """Each document counts its places from 0, a row's first one from `start`."""
    ids = torch.tensor(documents)
    index = torch.zeros_like(ids)
    for row in range(len(ids)):
        for document in set(documents[row]) - {0}:
            here = ids[row] == document
            index[row, here] = torch.arange(int(here.sum())) + (start if document == 1 else 0)
    places = Places(index, ids, torch.zeros_like(ids))
    keys = past.keys.append(places) if past else places
    return Layout(places, keys, index[..., None].expand(-1, -1, 3))


def close(actual: Tensor, expected: Tensor) -> None:
    """float32 sums of tens of terms in another order: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_are_the_same_padded_packed_and_cached(mixer: Any) -> None:
    x, other = torch.randn(1, 9, WIDTH), torch.randn(1, 4, WIDTH)
    alone = mixer(x, layout([[1] * 9]))
    nothing = torch.full((1, 4, WIDTH), 7.0)
    close(mixer(torch.cat([nothing, x], 1), layout([[0] * 4 + [1] * 9]))[:, 4:], alone)
    close(mixer(torch.cat([x, nothing], 1), layout([[1] * 9 + [0] * 4]))[:, :9], alone)
    close(mixer(torch.cat([other, x], 1), layout([[1] * 4 + [2] * 9]))[:, 4:], alone)
    close(mixer(torch.cat([x, other], 1), layout([[1] * 9 + [2] * 4]))[:, :9], alone)

    cache, parts, so_far = Cache(1), [], None
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:]):
        so_far = layout([[1] * piece.shape[1]], sum(part.shape[1] for part in parts), so_far)
        parts.append(mixer(piece, so_far, cache, 0))
    close(torch.cat(parts, 1), alone)
    fixed = mixer.cache_numbers_fixed() if hasattr(mixer, "cache_numbers_fixed") else 0
    assert cache.bytes() == 4 * (9 * mixer.cache_numbers_per_token() + fixed)
    assert mixer.attention_flops(100) >= mixer.attention_flops(10) > 0


@torch.no_grad()
def test_the_future_is_not_seen(mixer: Any) -> None:
    x = torch.randn(1, 9, WIDTH)
    moved = x.clone()
    moved[:, 6] += 1
    before, after = mixer(x, layout([[1] * 9])), mixer(moved, layout([[1] * 9]))
    close(after[:, :6], before[:, :6])
    assert (after[:, 6] - before[:, 6]).abs().max() > 1e-3


def test_gradients_are_finite_and_reach_the_input(mixer: Any) -> None:
    x = torch.randn(1, 9, WIDTH, requires_grad=True)
    mixer(x, layout([[1] * 5 + [2] * 4])).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and (x.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mixer.parameters())
